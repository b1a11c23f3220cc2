"""What a person sees while a run goes on: one line for each part, and bars for the long ones.

It owns how progress looks on a console; it must not know what the parts do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from halfbyte.train.display import Display, Silent, display_for, duration

NAME_WIDTH = 16


class Part:
    """One part of a run as it goes on: told how far it is and what came of it.

    Args:
        advance: Shows how far it is; None shows nothing.
    """

    def __init__(self, advance: Callable[[int, int], None] | None = None) -> None:
        self._advance = advance
        self.facts: list[str] = []

    def progress(self, done: int, total: int) -> None:
        """Items done and items in all."""
        if self._advance is not None:
            self._advance(done, total)

    def say(self, fact: str) -> None:
        """A fact for the line that is printed when the part is done."""
        self.facts.append(fact)


class Watch:
    """Shows a run's parts on a console, or nothing.

    Args:
        console: Where to; None shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console

    @contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Show a part while it goes on; a line with its facts and wall time stays when it is done.

        Args:
            name: What is done, in a word or two.
        """
        if self._console is None:
            yield Part()
            return
        began = time.perf_counter()
        if self._console.is_terminal:
            with _bar(self._console) as bar:
                task = bar.add_task(name, total=None)
                part = Part(lambda done, total: bar.update(task, completed=done, total=total))
                yield part
        else:
            part = Part()
            yield part
        took = duration(time.perf_counter() - began)
        facts = escape(", ".join(part.facts))
        line = f"[bold]{name:<{NAME_WIDTH}}[/] {took:>7}   {facts}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def training(self, log_steps: int) -> Display:
        """Display of training steps: a bar on a terminal, else a line every few steps.

        Args:
            log_steps: Steps between lines.
        """
        return display_for(self._console, log_steps) if self._console else Silent()

    def note(self, text: str) -> None:
        """A line for something the person should know."""
        if self._console is not None:
            self._console.print(f"[yellow]{escape(text)}[/]", highlight=False, soft_wrap=True)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
