"""Ledgers and forecasts of runs that never were, with numbers that are easy to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.plan.ledger import LEDGER, PLAN, Factors, Ledger, Peak, Planned
from halfbyte.plan.terms import Estimate, Forecast, Memory

MACHINE: dict[str, str | int | None] = {"processor": "AMD EPYC", "cores": 2}
KEY = ("AMD EPYC", 2, "1.0")


def forecast(step_seconds: float = 2.0, runtime: int = 300) -> Forecast:
    """1,000 bytes in all if the runtime takes 300."""
    step = Estimate.exact(step_seconds, "s", "calibrated")
    money = Estimate.unknown("money", "no price")
    memory = Memory(400, 50, 50, 50, 100, 25, 25, runtime)
    return Forecast(memory, "backward", 10, step, step.times(10), Estimate.exact(4.0, "Wh", "x"), money, 5000)


def ledger(**changes: Any) -> Ledger:
    """A run of 10 steps of 2 s in 1,000 bytes."""
    facts: dict[str, Any] = {
        "state": "done",
        "error": "",
        "began": "2026-01-01T00:00:00+00:00",
        "seconds": 25.0,
        "memory": Peak(1000, 700, 300, 0, "VmHWM"),
        "parts": {"base": 400, "adapters": 50},
        "resumed_after": 0,
        "steps": 10,
        "step_seconds": 2.0,
        "training_seconds": 20.0,
        "tokens": 4000,
        "energy": Estimate("Wh", 1.0, 5.0, 15.0, "time × power"),
        "cost": Estimate.unknown("money", "no price"),
        "co2": Estimate.unknown("g", "no country"),
        "counters": {"rapl": "none"},
        "written_bytes": 4000,
        "folder_bytes": 3000,
        "machine": MACHINE,
        "versions": {"halfbyte": "1.0", "torch": None},
        "settings_sha256": "0" * 64,
    }
    return Ledger(**(facts | changes))


def write_run(
    folder: Path, took: Ledger, planned: Forecast | None = None, factors: Factors | None = None
) -> Path:
    """A run's folder with both files."""
    folder.mkdir(parents=True)
    (folder / LEDGER).write_text(json.dumps(took.as_dict()), encoding="utf-8")
    content = Planned(planned, factors or Factors()).as_dict()
    (folder / PLAN).write_text(json.dumps(content), encoding="utf-8")
    return folder
