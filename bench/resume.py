"""Runs that are killed and resumed, beside one that is not: whether they end in the same bits.

It owns when a run is killed and what is compared; it must not know what a checkpoint holds.

    python bench/resume.py [--quick] [--kills N]

The runs are `halfbyte train` with QLoRA of base-11m, on real instruction rows (sft) and on real pairs (dpo) in turn,
a checkpoint after every second step, LoRA dropout on, packed. Each trial begins a run of its own, kills it with
SIGKILL, resumes it to its end, and compares every byte of the adapter with that of a run that was left alone. The
moments are drawn at random from the whole run, start-up included; in every second trial of a task the kill comes a
few milliseconds after a checkpoint is begun to be written.
"""

from __future__ import annotations

import argparse
import json
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
from preferences import fitting

STEPS, SAVE_STEPS = 12, 2
WEIGHTS = Path("adapter") / "adapter_model.safetensors"
LONGEST_S = 300.0


def measure(kills: int, quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    if quick:
        kills = 2
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        tasks = {name: Trials(name, Path(folder)) for name in ("sft", "dpo")}
        for task in tasks.values():
            yield Figure(f"{task.name}, run that is left alone: time", task.begin(), "s")
        for number in range(kills):
            [*tasks.values()][number % 2].trial(number, draw, saving=number % 4 > 1)
        for task in tasks.values():
            for moment, count in sorted(task.moments.items()):
                yield Figure(f"{task.name}, runs killed {moment}", count, "")
            claim = f"{task.name}, of {task.trials} runs killed and resumed, those that end in the same bits"
            yield Figure.at_least(claim, task.equal, "", task.trials)


class Trials:
    """Runs of one task.

    Args:
        name: The task.
        folder: Where they lie.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.moments: Counter[str] = Counter()
        self.trials = self.equal = 0
        rows = [shared("datasets/alpaca/alpaca_en_demo.json")]
        length = 1024
        if name == "dpo":
            rows, length = [fitting("dpo", folder, 512)], 512
        self.settings = {
            "task": name,
            "data.train": json.dumps([str(row) for row in rows]),
            "data.max_length": length,
            "lora.dropout": 0.1,
            "train.batch_size": 4,
            "train.gradient_accumulation_steps": 2,
            "train.max_steps": STEPS,
            "train.save_steps": SAVE_STEPS,
        }

    def begin(self) -> float:
        """The run that is left alone; its seconds."""
        whole = self.folder / f"{self.name}-whole"
        self.seconds = finish(self.start(whole))
        self.expected = (whole / WEIGHTS).read_bytes()
        return self.seconds

    def trial(self, number: int, draw: random.Random, *, saving: bool) -> None:
        """One run killed and resumed."""
        target = self.folder / f"killed-{number}"
        while (moment := kill(self.start(target), target, draw, self.seconds, saving=saving)) is None:
            shutil.rmtree(target)
        finish(self.start(target, resume=(target / "config.yaml").exists()))
        self.trials += 1
        self.moments[moment] += 1
        self.equal += (target / WEIGHTS).read_bytes() == self.expected
        shutil.rmtree(target)

    def start(self, target: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
        """A training run as a process."""
        command = [sys.executable, "-m", "halfbyte", "train", "--model", str(shared("models/base-11m"))]
        command += ["--output-dir", str(target), *(["--resume"] if resume else [])]
        for name, value in self.settings.items():
            command += ["--set", f"{name}={value}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, **quiet)


def finish(process: subprocess.Popen[bytes]) -> float:
    """Wait for a run's end; seconds. One that fails ends the benchmark with what it said."""
    began = time.perf_counter()
    _, said = process.communicate(timeout=LONGEST_S)
    if process.returncode:
        sys.exit(f"the run failed:\n{said.decode()[-3000:]}")
    return time.perf_counter() - began


def kill(
    process: subprocess.Popen[bytes], target: Path, draw: random.Random, seconds: float, *, saving: bool
) -> str | None:
    """Kill a run; says where it was, None where it had come to its end."""
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
