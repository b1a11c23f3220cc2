"""A forecast of memory against a run in a process of its own; a fault in the forecast shows in that comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.config import load_config
from halfbyte.plan import memory
from halfbyte.plan.expect import OWN_RUNTIME, WITHIN_BYTES, WITHIN_SHARE
from halfbyte.plan.ledger import Planned, read_plan
from halfbyte.plan.memory import Runtime, peak_of
from halfbyte.plan.work import Work
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare
from halfbyte.train.optimizer import build_optimizer

SCRIPT = """
import sys
from halfbyte.cli.app import call
try:
    call(sys.argv[1:])
finally:
    print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def is_right(forecast_bytes: int, measured_bytes: int) -> bool:
    """Within 3 % or 30 MB, as the benchmark has it."""
    return abs(forecast_bytes - measured_bytes) <= max(WITHIN_SHARE * measured_bytes, WITHIN_BYTES)


def carried_out(config: Config, folder: Path) -> tuple[int, Planned]:
    """The peak of the run's process, and what it had forecast of itself."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, "train", str(recipe)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (peak,) = [int(line.split()[1]) * 1024 for line in done.stderr.splitlines() if "VmHWM" in line]
    planned = read_plan(folder / "run")
    assert isinstance(planned, Planned)
    return peak, planned


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak")
def test_a_forecast_without_the_optimizers_state_is_seen_to_be_wrong(
    shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank so high that the state takes three times what a forecast may be off."""
    rows = [json.dumps({"text": "the cat sat on the mat and saw a dog " * 30 + str(n)}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    base = {
        "model": str(shared("models/base-11m")),
        "output_dir": str(tmp_path / "run"),
        "lora": {"r": 256},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "max_length": 256,
            "max_truncated": 1.0,
            "eval_fraction": 0.0,
        },
        "train": {"max_steps": 3, "batch_size": 1},
    }
    config = load_config(None, (), base)
    measured, planned = carried_out(config, tmp_path)
    forecast = planned.forecast
    assert forecast is not None
    assert forecast.assumptions["runtime"] == OWN_RUNTIME
    assert is_right(forecast.peak_bytes, measured), (forecast.memory, measured)

    runtime = forecast.memory.runtime

    def again() -> int:
        found = peak_of(
            config,
            Work.of_task(prepare(config)).largest,
            runtime=Runtime(0, runtime, 0),
            room=lambda *_: 10**9,
            residency="resident",
        )
        return found.memory.total

    assert is_right(again(), measured)
    plain = config.train.model_copy(update={"optimizer": "sgd"})
    monkeypatch.setattr(
        memory, "build_optimizer", lambda model, _, pages: build_optimizer(model, plain, pages)
    )
    assert not is_right(again(), measured)
