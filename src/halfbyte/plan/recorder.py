"""Watches a run from its beginning to whatever end it comes to, and writes down what it took.

It owns what is measured of a run and when; it must not know what the run does, and measures nothing inside of it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.errors import HalfbyteError
from halfbyte.plan.cost import co2_of, cost_of
from halfbyte.plan.energy import Meter
from halfbyte.plan.ledger import LEDGER, Ledger, Peak, read_ledger
from halfbyte.plan.terms import Estimate
from halfbyte.system import process_bytes

if TYPE_CHECKING:
    from halfbyte.settings import Config

MEMORY_EVERY_S = 0.1
COUNTERS_EVERY_S = 10.0
INTERRUPTED = ("HB503",)


class MemoryWatch:
    """The highest resident memory of this process from its making on, and what it was made of.

    Args:
        root: Where `proc` is.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before = process_bytes(self._root).get("VmHWM")
        self._fullest: dict[str, int] = {}

    def look(self) -> None:
        """Remember this moment if it is the fullest so far."""
        now = process_bytes(self._root)
        if now.get("VmRSS", 0) > self._fullest.get("VmRSS", 0):
            self._fullest = now

    def peak(self) -> Peak:
        """The peak so far."""
        self.look()
        fullest, most = self._fullest, process_bytes(self._root).get("VmHWM")
        split = {name: fullest.get(f"Rss{name.capitalize()}") for name in ("anon", "file", "shmem")}
        if most is None:
            return Peak(None, **split, method="this system does not say")
        if self._before is not None and most <= self._before:
            method = "fullest of the moments looked at; the process had held more before"
            return Peak(fullest.get("VmRSS"), **split, method=method)
        return Peak(most, **split, method="VmHWM; its parts at the fullest of the moments looked at")


class _Watching(threading.Thread):
    """Calls functions again and again, each at its own pace, until it is told to stop."""

    def __init__(self, jobs: Mapping[Callable[[], None], float]) -> None:
        super().__init__(name="halfbyte-ledger", daemon=True)
        self._due = dict.fromkeys(jobs, time.monotonic())
        self._jobs = jobs
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(min(self._jobs.values())):
            for job, every in self._jobs.items():
                if time.monotonic() >= self._due[job]:
                    self._due[job] = time.monotonic() + every
                    job()

    def stop(self) -> None:
        self._stopped.set()
        self.join()


@dataclass
class Recorder:
    """What a run took, from entering the block to its end.

    `finish` writes the ledger of a run that is done; leaving the block by an error writes that of one that is not.

    Args:
        folder: The run's folder.
        config: Its settings.
        machine: What it runs on: `processor`, `cores` and what else is known.
        versions: Of this package and those it stands on.
        write: Writes a JSON file into the folder, whole or not at all.
        resumed_after: Step after which it goes on; 0 for a new run.
        parts: Bytes of `Memory`'s parts, as they become known.
        root: Where `proc` and `sys` are.
    """

    folder: Path
    config: Config
    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    write: Callable[[str, Mapping[str, Any]], object]
    resumed_after: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    root: Path = Path("/")

    def __enter__(self) -> Recorder:
        self._began, self._finished = datetime.now(UTC).isoformat(), False
        settings = self.config.cost
        self._meter = Meter(str(self.machine.get("processor", "")), settings.machine_watts, self.root)
        self._memory = MemoryWatch(self.root)
        self._written_before = _written(self.root)
        self._watching = _Watching({self._memory.look: MEMORY_EVERY_S, self._meter.advance: COUNTERS_EVERY_S})
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.stop()
        if error is None or self._finished:
            return
        code = error.code if isinstance(error, HalfbyteError) else type(error).__name__
        stopped = code in INTERRUPTED or isinstance(error, KeyboardInterrupt)
        try:
            self._write("interrupted" if stopped else "failed", code)
        except OSError as fault:  # the disk may be what stopped the run
            error.add_note(f"What the run took could not be written down: {fault}")

    def finish(self) -> Ledger:
        """Write and give what the run took; it is done."""
        self._watching.stop()
        self._finished = True
        return self._write("done", "")

    def _write(self, state: Literal["done", "interrupted", "failed"], error: str) -> Ledger:
        reading, steps = self._meter.read(), _steps(self.folder / "metrics.jsonl", self.resumed_after)
        seconds = [step["tokens"] / step["tokens_per_s"] for step in steps if step["tokens_per_s"]]
        settings = self.config.cost
        folder_bytes = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        ledger = Ledger(
            state=state,
            error=error,
            began=self._began,
            seconds=reading.seconds,
            memory=self._memory.peak(),
            parts=self.parts,
            resumed_after=self.resumed_after,
            steps=len(steps),
            step_seconds=statistics.median(seconds[1:]) if len(seconds) > 1 else None,
            training_seconds=sum(seconds),
            tokens=sum(step["tokens"] for step in steps),
            energy=reading.energy,
            cost=cost_of(Estimate.exact(reading.seconds, "s", "measured"), reading.energy, settings),
            co2=co2_of(reading.energy, settings),
            counters=reading.counters,
            written_bytes=self._written(folder_bytes),
            folder_bytes=folder_bytes,
            machine=dict(self.machine),
            versions=dict(self.versions),
            settings_sha256=hashlib.sha256(self.config.to_yaml().encode()).hexdigest(),
            earlier=self._earlier(),
        )
        self.write(LEDGER, ledger.as_dict())
        return ledger

    def _written(self, folder_bytes: int) -> int | None:
        """Bytes sent to disks; a file system in memory counts none of those that lie in the folder."""
        after = _written(self.root)
        if after is None or self._written_before is None:
            return None
        written = after - self._written_before
        return written if written or not folder_bytes else None

    def _earlier(self) -> list[dict[str, Any]]:
        """What the run took before it was interrupted, as far as it was written down."""
        before = read_ledger(self.folder) if self.resumed_after else None
        if not isinstance(before, Ledger):
            return []
        told = before.as_dict()
        return [*told.pop("earlier"), told]


def _steps(metrics: Path, after: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl from a step on; one cut off by a crash ends them."""
    found = []
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)
            except ValueError:
                break
            if step["step"] > after:
                found.append(step)
    return found


def _written(root: Path) -> int | None:
    """Bytes this process has sent to disks so far; None where the system does not count."""
    try:
        lines = (root / "proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)
