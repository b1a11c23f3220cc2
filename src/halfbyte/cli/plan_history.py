"""`halfbyte plan --history`: what runs were forecast to take, and what they took.

It owns how that looks; it must not know how runs are found or compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.consoles import STDOUT, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from halfbyte.plan.history import Difference, History, PastRun

DEFAULT = Path("runs")


def history(folders: Sequence[Path], *, as_json: bool = False) -> None:
    """Print past runs against their forecasts, the errors so far, and what they correct on this machine.

    Args:
        folders: Folders of runs, or that hold runs; none means `runs`.
        as_json: Print JSON.

    Raises:
        PlanError: HB710 for a folder that does not exist.
    """
    from halfbyte import __version__
    from halfbyte.govern.manifest import Hardware
    from halfbyte.plan.history import look_back, recalibration

    found = look_back(folders or [DEFAULT])
    here = Hardware.here()
    factors = recalibration(found.runs, (here.processor, here.cores, __version__))
    if as_json:
        print_json(
            {
                "runs": [run.as_dict() for run in found.runs],
                "errors": [error._asdict() for error in found.errors()],
                "recalibration": vars(factors),
                "refused": [{"file": str(one.file), "why": one.why} for one in found.refused],
            }
        )
        return
    _say("No run has left a ledger there yet." if not found.runs else "")
    if found.runs:
        STDOUT.print(_table(found))
    for error in found.errors():
        runs = f"{error.runs} run{'s' * (error.runs != 1)}"
        _say(f"{error.what}: {error.mean:.1%} off on average, {error.worst:+.1%} at worst, over {runs}")
    if factors.runs:
        _say(
            f"Next forecasts on this machine: time × {factors.time:.3f}, runtime memory × {factors.runtime:.3f}, "
            f"from {factors.runs} runs"
        )
    elif found.runs:
        _say(f"Next forecasts on this machine are not corrected: {factors.why}")
    for one in found.refused:
        _say(f"not read: {one.file}: {one.why}")


def _say(text: str) -> None:
    if text:
        STDOUT.print(text, highlight=False, markup=False, soft_wrap=True)


def _table(found: History) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("run", "began", "", "memory", "step", "energy"):
        table.add_column(heading, no_wrap=heading == "run")
    for run in found.runs:
        by_name = {difference.what: difference for difference in run.differences()}
        table.add_row(
            run.folder.name,
            run.ledger.began[:16].replace("T", " "),
            run.ledger.state,
            _memory(run, by_name.get("memory")),
            _step(run, by_name.get("step time")),
            _energy(run, by_name.get("energy")),
        )
    return table


def _memory(run: PastRun, difference: Difference | None) -> str:
    return _against(size(run.ledger.memory.nbytes), difference, lambda value: size(round(value)))


def _step(run: PastRun, difference: Difference | None) -> str:
    seconds = run.ledger.step_seconds
    return _against(
        "unknown" if seconds is None else f"{seconds:.3g} s", difference, lambda value: f"{value:.3g} s"
    )


def _energy(run: PastRun, difference: Difference | None) -> str:
    from halfbyte.report.amounts import amount

    return _against(amount(run.ledger.energy), difference, lambda value: f"{value:.3g} Wh")


def _against(measured: str, difference: Difference | None, text: Callable[[float], str]) -> str:
    """What was measured, and what was forecast with its error."""
    if difference is None:
        return f"{measured}\nno forecast"
    return f"{measured}\n{text(difference.forecast)} forecast, {difference.error:+.1%}"
