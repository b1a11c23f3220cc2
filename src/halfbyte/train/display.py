"""Progress of a run for people: a live bar on a terminal, plain lines elsewhere, or nothing.

It owns how a step looks on stderr; it knows nothing of how training works.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from halfbyte.train.metrics import StepRecord


class Display(Protocol):
    """What a training run tells its watcher."""

    def start(self, total_steps: int) -> None:
        """The run begins."""

    def step(self, record: StepRecord) -> None:
        """One optimizer step is done."""

    def stop(self) -> None:
        """The run ended, well or not."""


class Silent:
    """Shows nothing."""

    def start(self, total_steps: int) -> None:
        """Shows nothing."""

    def step(self, record: StepRecord) -> None:
        """Shows nothing."""

    def stop(self) -> None:
        """Shows nothing."""


class Lines:
    """A plain line for the first, the last and every n-th step, for logs and pipes.

    Args:
        console: Where to print.
        every: Steps between lines.
    """

    def __init__(self, console: Console, every: int) -> None:
        self._console = console
        self._every = every
        self._total = 0

    def start(self, total_steps: int) -> None:
        """Remember how far it is."""
        self._total = total_steps

    def step(self, record: StepRecord) -> None:
        """Print the step if it is due."""
        measured = record.held_out_loss is not None
        if record.step % self._every and record.step not in (1, self._total) and not measured:
            return
        left_s = record.seconds / record.step * (self._total - record.step)
        line = (
            f"step {record.step}/{self._total} ({record.step / self._total:.0%})  loss {record.loss:.4f}  "
            f"{record.tokens_per_s:,.0f} tokens/s  {record.documents:,} rows, {record.fill:.0%} full  "
            f"{duration(left_s)} left"
        )
        if measured:
            line += f"  held-out loss {record.held_out_loss:.4f}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing to put away."""


class Bar:
    """A live progress bar with loss, tokens per second, how full the passes are and the time left.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn("held out {task.fields[held_out]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[fill]} full"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._progress.add_task("train", total=None, loss="-", held_out="-", speed="-", fill="-")

    def start(self, total_steps: int) -> None:
        """Show the empty bar."""
        self._progress.update(self._task, total=total_steps)
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        """Advance the bar."""
        self._progress.update(
            self._task,
            completed=record.step,
            loss=f"{record.loss:.4f}",
            speed=f"{record.tokens_per_s:,.0f}",
            fill=f"{record.fill:.0%}",
        )
        if record.held_out_loss is not None:
            self._progress.update(self._task, held_out=f"{record.held_out_loss:.4f}")

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class Shown:
    """Starts and stops a display around a block, whatever happens inside.

    Args:
        display: What shows.
        total_steps: Optimizer steps to come.
    """

    def __init__(self, display: Display, total_steps: int) -> None:
        self._display = display
        self._total = total_steps

    def __enter__(self) -> Display:
        self._display.start(self._total)
        return self._display

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()


def display_for(console: Console, every: int) -> Display:
    """A live bar if the console is a terminal, plain lines every few steps if not."""
    return Bar(console) if console.is_terminal else Lines(console, every)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0:42, 12:05, 3:07:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
