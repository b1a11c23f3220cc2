"""How wrong forecasts were: runs that say what they were to take and what they took, and what to correct by.

It owns the comparison and the correction; it must not know how forecasts are made nor how they are shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import PlanError
from halfbyte.plan.ledger import LEDGER, Factors, Ledger, Planned, Refused, read_ledger, read_plan
from halfbyte.plan.terms import Estimate, Memory

FEWEST_RUNS = 3
"""Of as many runs the median survives one that something else disturbed."""

MOST = 1.5
"""No correction goes further: beyond it a forecast is wrong in its making, and no factor mends that."""

RUNS_READ = 50
"""Of the runs beside one, as many are read, the newest."""


class Difference(NamedTuple):
    """One forecast number against what was measured.

    Attributes:
        what: `memory`, `step time`, `energy`, `cost`, `disk`, or a part of `Memory`.
        unit: Of both.
        forecast: The number forecast.
        measured: The number measured.
    """

    what: str
    unit: str
    forecast: float
    measured: float

    @property
    def error(self) -> float:
        """By how much the forecast was too high, as a share of what was measured; negative if it was too low."""
        return self.forecast / self.measured - 1


@dataclass(frozen=True)
class PastRun:
    """A run that left a ledger.

    Attributes:
        folder: Its folder.
        ledger: What it took.
        planned: What was forecast; None where nothing was.
    """

    folder: Path
    ledger: Ledger
    planned: Planned | None

    @classmethod
    def of(cls, folder: Path, ledger: Ledger) -> PastRun:
        """A run whose ledger is at hand, with its forecast if that can be trusted."""
        planned = read_plan(folder)
        return cls(folder, ledger, planned if isinstance(planned, Planned) else None)

    def differences(self) -> list[Difference]:
        """Everything that was both forecast and measured, and is not 0."""
        if self.planned is None or self.planned.forecast is None:
            return []
        f, took = self.planned.forecast, self.ledger
        has_model = f.phase != "prepare"  # at whose peak there is none yet
        pairs: list[tuple[str, str, float | None, float | None]] = [
            ("memory", "bytes", f.peak_bytes, took.memory.nbytes),
            ("step time", "s", f.step_seconds.mid, took.step_seconds),
            ("energy", "Wh", *_same_unit(f.energy, took.energy)),
            ("cost", f.cost.unit, *_same_unit(f.cost, took.cost)),
            ("disk", "bytes", f.disk_bytes, took.written_bytes),
            *(
                (part, "bytes", getattr(f.memory, part, None), n)
                for part, n in took.parts.items()
                if has_model
            ),
        ]
        return [Difference(what, unit, a, b) for what, unit, a, b in pairs if a is not None and b]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        took = self.ledger
        return {
            "folder": str(self.folder),
            "began": took.began,
            "state": took.state,
            "machine": took.machine,
            "versions": took.versions,
            "steps": took.steps,
            "memory": {"bytes": took.memory.nbytes, "method": took.memory.method},
            "step_seconds": took.step_seconds,
            "energy": took.energy._asdict(),
            "cost": took.cost._asdict(),
            "co2": took.co2._asdict(),
            "differences": [d._asdict() | {"error": d.error} for d in self.differences()],
        }


class ErrorSoFar(NamedTuple):
    """How wrong forecasts of one number were.

    Attributes:
        what: The number.
        runs: Runs behind it.
        mean: Mean of the errors without their sign.
        worst: The largest of them, with its sign.
    """

    what: str
    runs: int
    mean: float
    worst: float


@dataclass(frozen=True)
class History:
    """Past runs, oldest first.

    Attributes:
        runs: Those whose ledger can be trusted.
        refused: Files that cannot, and why.
    """

    runs: tuple[PastRun, ...]
    refused: tuple[Refused, ...]

    def errors(self) -> tuple[ErrorSoFar, ...]:
        """The errors so far, number by number."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for difference in run.differences():
                found.setdefault(difference.what, []).append(difference.error)
        return tuple(
            ErrorSoFar(what, len(each), statistics.fmean(map(abs, each)), max(each, key=abs))
            for what, each in found.items()
        )


def look_back(folders: Iterable[Path]) -> History:
    """Find all runs in some folders and below them.

    Args:
        folders: Folders of runs, or folders that hold them.

    Raises:
        PlanError: HB710 if one of them does not exist.
    """
    runs, refused = [], []
    for folder in _with_ledgers(folders):
        ledger, planned = read_ledger(folder), read_plan(folder)
        refused += [one for one in (ledger, planned) if isinstance(one, Refused)]
        if isinstance(ledger, Ledger):
            runs.append(PastRun.of(folder, ledger))
    return History(tuple(sorted(runs, key=lambda run: run.ledger.began)), tuple(refused))


def runs_beside(folder: Path) -> tuple[PastRun, ...]:
    """The newest runs that lie in the same folder as one.

    Args:
        folder: Of a run, which need not be there.
    """
    ledgers = sorted(folder.absolute().parent.glob(f"*/{LEDGER}"), key=lambda file: file.stat().st_mtime)
    found = [(file.parent, read_ledger(file.parent)) for file in ledgers[-RUNS_READ:]]
    return tuple(PastRun.of(place, ledger) for place, ledger in found if isinstance(ledger, Ledger))


def recalibration(
    runs: Sequence[PastRun], machine: tuple[object, ...], like: Mapping[str, str] | None = None
) -> Factors:
    """What the next forecasts for a machine are to be multiplied with: median of measured by forecast.

    Forecasts that were multiplied already are taken as they were before. All memory that a forecast does not account
    for is taken to be the runtime's. Only runs of the same processor, cores and version count that did not fail, and
    of these only where a step was timed, or the peak is the run's own.

    Args:
        runs: Past runs.
        machine: `Ledger.machine_key` of the machine and version to forecast for.
        like: Assumptions that their forecasts must have made.
    """
    times, runtimes = [], []
    for run in runs:
        took, planned = run.ledger, run.planned
        if (
            planned is None
            or planned.forecast is None
            or took.machine_key != machine
            or took.state == "failed"
            or not (like or {}).items() <= planned.forecast.assumptions.items()
        ):
            continue
        step, memory = planned.forecast.step_seconds.mid, planned.forecast.memory
        if step and took.step_seconds:
            times.append(took.step_seconds / step * planned.factors.time)
        ratio = _runtime_ratio(memory, took)
        if ratio is not None:
            runtimes.append(ratio * planned.factors.runtime)
    enough = [len(each) for each in (times, runtimes) if len(each) >= FEWEST_RUNS]
    if not enough:
        most = max(len(times), len(runtimes))
        why = f"{most} run(s) of this machine and version tell forecast and measurement, {FEWEST_RUNS} are needed"
        return Factors(runs=0, why=why)
    return Factors(
        time=_correction(times),
        runtime=_correction(runtimes),
        runs=min(enough),
        why="",
        spread=(_spread(times), _spread(runtimes)),
    )


def _correction(ratios: list[float]) -> float:
    """The median of enough ratios, within bounds; 1 where they are too few."""
    if len(ratios) < FEWEST_RUNS:
        return 1.0
    return min(MOST, max(1 / MOST, statistics.median(ratios)))


def _spread(ratios: list[float]) -> tuple[float, float]:
    return (min(ratios), max(ratios)) if len(ratios) >= FEWEST_RUNS else (1.0, 1.0)


def _runtime_ratio(memory: Memory, took: Ledger) -> float | None:
    """The runtime's memory by what was forecast of it; None where the peak is not known, or is below all the rest."""
    if took.memory.nbytes is None or not took.memory.method.startswith("VmHWM") or not memory.runtime:
        return None
    measured = took.memory.nbytes - (memory.total - memory.runtime)
    return measured / memory.runtime if measured > 0 else None


def _with_ledgers(folders: Iterable[Path]) -> list[Path]:
    found = set()
    for folder in folders:
        if not folder.is_dir():
            raise PlanError(
                "HB710", "there is no such folder", where=str(folder), fix="name a folder that holds runs"
            )
        found |= {file.parent for file in folder.rglob(LEDGER)}
    return sorted(found)


def _same_unit(a: Estimate, b: Estimate) -> tuple[float | None, float | None]:
    return (a.mid, b.mid) if a.unit == b.unit else (None, None)
