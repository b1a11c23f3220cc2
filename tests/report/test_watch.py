"""Promises of the watch: a line for each part, nothing where nothing is watched, text never read as markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from halfbyte.report.watch import Watch
from halfbyte.train.display import Bar, Lines, Silent


def _console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


def test_a_finished_part_leaves_a_line_with_its_facts() -> None:
    console, text = _console()
    with Watch(console).part("save") as part:
        part.progress(1, 2)
        part.say("runs/[bold]a[/bold]")
        part.say("3 files")
    assert text.getvalue().split() == ["save", "0:00", "runs/[bold]a[/bold],", "3", "files"]


def test_a_terminal_sees_how_far_a_part_is() -> None:
    console, text = _console(terminal=True)
    with Watch(console).part("measure") as part:
        part.progress(1, 4)
        # the live bar is drawn by a timer; the last state is drawn at the latest when the part ends
    assert "25%" in text.getvalue()


def test_a_part_that_fails_is_not_reported_as_done() -> None:
    console, text = _console()
    with pytest.raises(ZeroDivisionError), Watch(console).part("measure"):
        raise ZeroDivisionError
    assert text.getvalue() == ""


def test_nothing_is_shown_without_a_console() -> None:
    watch = Watch()
    with watch.part("measure") as part:
        part.progress(1, 2)
        part.say("fact")
    watch.note("a note")
    assert isinstance(watch.training(1), Silent)


def test_notes_are_text() -> None:
    console, text = _console()
    Watch(console).note("rows [1] to [2]")
    assert text.getvalue() == "rows [1] to [2]\n"


def test_training_is_shown_as_the_console_can() -> None:
    assert isinstance(Watch(_console(terminal=True)[0]).training(1), Bar)
    assert isinstance(Watch(_console()[0]).training(1), Lines)
