"""halfbyte's side of bench/step_vs_peers.py: its own training loop on a model in NF4, stopped after each step.

It owns the settings of this side; it must not know what it is compared with.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Link

import halfbyte
from halfbyte.data.examples import Listed
from halfbyte.data.tokenise import Example
from halfbyte.model.blocks import plan_memory
from halfbyte.settings import TrainConfig
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.metrics import StepRecord


class Turns:
    """A display that lets the loop go on when it is told to."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def start(self, total_steps: int) -> None:
        """Everything is loaded."""
        self._link.ready()

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        self._link.done(tokens=record.tokens, trained=record.trained_tokens, loss=record.loss)

    def stop(self) -> None:
        """The loop ended; it never does by itself."""


def example(number: int, row: dict[str, Any]) -> Example:
    return Example(
        input_ids=np.asarray(row["input_ids"], np.int32),
        trained=np.asarray(row["trained"], np.bool_),
        prompt_ids=None,
        answer=None,
        id=f"{number:016x}",
        where=f"row {number}",
        truncated=False,
    )


def main() -> None:
    link = Link()
    options = link.options
    torch.set_num_threads(options["threads"])
    model = halfbyte.load(options["model"], quantization="nf4", dtype=options["dtype"])
    halfbyte.add_lora(model, r=options["r"], alpha=options["alpha"])
    if options.get("recompute"):
        plan_memory(model, 1, budget_bytes=0)
    rows = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    config = TrainConfig(
        batch_size=options["batch_size"], max_steps=10**6, learning_rate=options["learning_rate"]
    )
    with tempfile.TemporaryDirectory() as folder:
        run = TrainRun(Path(folder), lambda _: None, seed=options["seed"], display=Turns(link))
        train(model, Listed([example(number, row) for number, row in enumerate(rows)]), config, run)


if __name__ == "__main__":
    main()
