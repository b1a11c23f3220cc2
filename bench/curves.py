"""Do the fast kernels train the same model? Loss curves of the fused bfloat16 path and of plain float32 PyTorch.

It owns the two sides and how far apart they may end; it must not know how either computes.

    python bench/curves.py [--quick]

Model: base-11m in NF4, LoRA on every linear layer. Rows: alpaca_en_demo.json, packed; both sides see the same rows in
the same order from the same adapter. The plain side runs in a process of its own with `HALFBYTE_BACKEND=reference`:
transformers' own layers and attention, weights dequantised by PyTorch, everything in float32. A final loss is the
mean of the last tenth of the steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.tasks.known import prepare
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.methods import load_base, make_trainable

WITHIN = 0.003
"""Most that the final losses may differ, as a share of the plain one."""

STEPS, QUICK_STEPS = 200, 10
SIDES = {"fused bfloat16": ("bfloat16", "native"), "plain float32": ("float32", "reference")}


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    steps = QUICK_STEPS if quick else STEPS
    curves = {name: _curve_of_a_process(*side, steps) for name, side in SIDES.items()}
    fused, plain = curves.values()
    last = max(1, steps // 10)
    ends = {name: sum(curve[-last:]) / last for name, curve in curves.items()}
    for name, end in ends.items():
        yield Figure(f"base-11m, {steps} steps: final loss, {name}", end, "nats per token")
    yield Figure(f"base-11m, {steps} steps: first loss, {tuple(SIDES)[1]}", plain[0], "nats per token")
    largest = max(abs(a - b) / b for a, b in zip(fused, plain, strict=True))
    yield Figure(f"base-11m, {steps} steps: largest difference of any step's loss", largest, "share")
    one, other = ends.values()
    claim = f"base-11m, {steps} steps: final losses apart"
    yield Figure.at_most(claim, abs(one - other) / other, "share", WITHIN)


def _curve_of_a_process(dtype: str, backend: str, steps: int) -> list[float]:
    environment = {**os.environ, "HALFBYTE_BACKEND": backend}
    command = [sys.executable, __file__, "--curve", dtype, str(steps)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    curve: list[float] = json.loads(done.stdout.splitlines()[-1])
    return curve


def curve(dtype: str, steps: int) -> list[float]:
    """Losses of each step of training, in this process."""
    settings = {
        "model": str(shared("models/base-11m")),
        "method": "qlora",
        "dtype": dtype,
        "data": {
            "train": [str(shared("datasets/alpaca/alpaca_en_demo.json"))],
            "eval_fraction": 0.0,
            "max_length": 256,
            "max_truncated": 1.0,
        },
        "train": {"max_steps": steps, "batch_tokens": 1024, "learning_rate": 2e-3},
    }
    config = load_config(None, base=settings)
    task = prepare(config)
    model = load_base(config)
    make_trainable(model, config)
    with tempfile.TemporaryDirectory() as folder:
        place = TrainRun(Path(folder), save=lambda _: None, pad_id=task.pad_id)
        train(model, task.rows.train, config.train, place)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--curve"]:
        print(json.dumps(curve(sys.argv[2], int(sys.argv[3]))))
    else:
        sys.exit(run("curves", measure))
