"""Promises of the progress display: lines for logs, a bar for terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from halfbyte.train.display import Bar, Lines, Shown, Silent, display_for, duration
from halfbyte.train.metrics import StepRecord


def _record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step / 10,
        loss=2.0 / step,
        lr=1e-4,
        grad_norm=1.0,
        trained_tokens=50,
        tokens=100,
        documents=21,
        fill=0.984,
        tokens_per_s=1234.5,
        seconds=2.0 * step,
        peak_rss_bytes=None,
    )


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


def test_lines_show_first_every_nth_and_last_step() -> None:
    console, text = _console(terminal=False)
    with Shown(display_for(console, every=4), total_steps=10) as display:
        for step in range(1, 11):
            display.step(_record(step))
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "8/10", "10/10"]
    assert lines[1] == "step 4/10 (40%)  loss 0.5000  1,234 tokens/s  21 rows, 98% full  0:12 left"


def test_a_terminal_gets_a_bar_with_loss_speed_and_percentage() -> None:
    console, text = _console(terminal=True)
    with Shown(display_for(console, every=4), total_steps=10) as display:
        display.step(_record(5))
    shown = text.getvalue()
    for part in ("50%", "5/10", "0.4000", "1,234 tokens/s", "98% full"):
        assert part in shown


def test_the_display_is_stopped_when_training_fails() -> None:
    class Watched(Silent):
        stopped = False

        def stop(self) -> None:
            self.stopped = True

    display = Watched()
    with pytest.raises(ZeroDivisionError), Shown(display, 3):
        raise ZeroDivisionError
    assert display.stopped


def test_the_kind_of_display_follows_the_terminal() -> None:
    assert isinstance(display_for(_console(terminal=True)[0], 1), Bar)
    assert isinstance(display_for(_console(terminal=False)[0], 1), Lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (42, "0:42"), (725, "12:05"), (11229, "3:07:09")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
