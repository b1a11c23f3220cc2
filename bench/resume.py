"""Runs that are killed and resumed, beside one that is not: whether they end in the same bits.

It owns when a run is killed and what is compared; it must not know what a checkpoint holds.

    python bench/resume.py [--quick] [--kills N]

The run is `halfbyte train` with QLoRA of base-11m on real instruction rows, a checkpoint after every second step,
LoRA dropout on. Each trial begins a run of its own, kills it with SIGKILL, resumes it to its end, and compares every
byte of the adapter with that of a run that was left alone. The moments are drawn at random from the whole run,
start-up included; in every second trial the kill comes a few milliseconds after a checkpoint is begun to be written.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from figures import Figure, run, shared

STEPS, SAVE_STEPS = 12, 2
WEIGHTS = Path("adapter") / "adapter_model.safetensors"
LONGEST_S = 300.0


def measure(kills: int, quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    if quick:
        kills = 2
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds = finish(root / "whole", resume=False)
        expected = (root / "whole" / WEIGHTS).read_bytes()
        yield Figure("run that is left alone: time", seconds, "s")
        came: Counter[str] = Counter()
        equal = 0
        for number in range(kills):
            target = root / f"killed-{number}"
            while (moment := kill(target, draw, seconds, saving=number % 2 == 1)) is None:
                shutil.rmtree(target)
            came[moment] += 1
            finish(target, resume=(target / "config.yaml").exists())
            equal += (target / WEIGHTS).read_bytes() == expected
            shutil.rmtree(target)
        for moment, count in sorted(came.items()):
            yield Figure(f"runs killed {moment}", count, "")
        yield Figure.at_least(
            f"of {kills} runs killed and resumed, those that end in the same bits", equal, "", kills
        )


def start(target: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    """A training run as a process."""
    settings = {
        "data.train": f"[{shared('datasets/alpaca/alpaca_en_demo.json')}]",
        "data.max_length": "1024",
        "lora.dropout": "0.1",
        "train.batch_size": "4",
        "train.gradient_accumulation_steps": "2",
        "train.max_steps": str(STEPS),
        "train.save_steps": str(SAVE_STEPS),
    }
    command = [sys.executable, "-m", "halfbyte", "train", "--model", str(shared("models/base-11m"))]
    command += ["--output-dir", str(target), *(["--resume"] if resume else [])]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )


def finish(target: Path, *, resume: bool) -> float:
    """Run to the end; seconds. One that fails ends the benchmark with what it said."""
    began = time.perf_counter()
    process = start(target, resume=resume)
    _, said = process.communicate(timeout=LONGEST_S)
    if process.returncode:
        sys.exit(f"the run failed:\n{said.decode()[-3000:]}")
    return time.perf_counter() - began


def kill(target: Path, draw: random.Random, seconds: float, *, saving: bool) -> str | None:
    """Start a run and kill it; says where it was, None where it had come to its end."""
    process = start(target, resume=False)
    began, wait = time.perf_counter(), draw.uniform(0.02, 0.98) * seconds
    checkpoints = target / "checkpoints"
    wanted = draw.randrange(1, STEPS // SAVE_STEPS)
    while process.poll() is None and time.perf_counter() - began < LONGEST_S:
        if saving:
            begun = {path.name.split(".")[1] for path in half_written(checkpoints)}
            if any(int(name.removeprefix("step-")) >= wanted * SAVE_STEPS for name in begun):
                time.sleep(draw.uniform(0.0, 0.01))
                break
        elif time.perf_counter() - began > wait:
            break
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return None
    if half_written(checkpoints):
        return "while a checkpoint was written"
    metrics = target / "metrics.jsonl"
    return "between or within steps" if metrics.exists() else "before their first step"


def half_written(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob(".step-*.new")) if checkpoints.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs that are killed and resumed.", epilog="--quick and --results: as all benchmarks."
    )
    parser.add_argument("--kills", type=int, default=20, help="runs to kill")
    options, rest = parser.parse_known_args()
    return run("resume", partial(measure, options.kills), rest)


if __name__ == "__main__":
    sys.exit(main())
