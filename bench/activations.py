"""What layers that keep in 8 bits or on disk take and give: memory held, gradient error, time of a step.

It owns the shapes, the ways and their floors; it must not know how anything is kept.

    python bench/activations.py [--quick] [--shape NAME] [--tokens N]

One row, every token trained, random weights in NF4, LoRA of rank 16 beside all linear layers; in each way all
layers but the last keep alike, and the last keeps everything. What is held is what autograd was given to save. The
disk is the one that holds the system's temporary files; its cache is part of what is measured, as it is in training.

Convergence is of base-11m on alpaca_en_demo.json, packed: the same rows, order and adapter, exact and in 8 bits. A
final loss is the mean of the last tenth of the steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import halfbyte
from figures import Figure, run, shared, time_sides
from growth import SHAPES, model_folder
from halfbyte.config import load_config
from halfbyte.data.pack import UNTRAINED
from halfbyte.model import functions
from halfbyte.model.blocks import fused_layers, plan_memory
from halfbyte.model.heads import trained_loss
from halfbyte.tasks.known import prepare
from halfbyte.train.deviation import MUCH, deviation
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.methods import load_base, make_trainable

WAYS = {
    "computed again": "input",
    "exact products": "costly",
    "8 bits": "eight_bit",
    "disk": "disk",
    "computed again from disk": "disk_input",
}
HELD = 0.7
"""Most that 8 bits may hold of what exact products hold, in bfloat16: queries and keys stay as they are."""
PACKING = 0.05
"""Most of a step's processor time that rounding and its reverse may take."""
WITHIN = 0.003
"""Most that the final losses may differ, as a share of the exact one: what bfloat16 is held to in curves.py."""
STEPS, QUICK_STEPS = 200, 5


def measure(shape: str, tokens: int, quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    if quick:
        shape, tokens = "11M", 128
    model = halfbyte.load(model_folder(shape), quantization="nf4", dtype="bfloat16")
    halfbyte.add_lora(model, r=16, alpha=32)
    model.train()
    yield from ways(model, f"{shape}, {tokens} tokens", tokens, quick)
    yield from convergence(QUICK_STEPS if quick else STEPS, has_floor=not quick)


def ways(model: PreTrainedModel, where: str, tokens: int, quick: bool) -> Iterator[Figure]:
    """Memory and time of each way, and what 8 bits change."""
    with tempfile.TemporaryDirectory() as folder:

        def step_in(names: str) -> Callable[[], None]:
            keep_in(model, tokens, names, Path(folder))
            kept = [(layer, layer.keep, layer.offload) for layer in fused_layers(model)]

            def run_step() -> None:
                for layer, keep, offload in kept:
                    layer.keep, layer.offload = keep, offload
                step(model, tokens)

            return run_step

        sides = {way: step_in(name) for way, name in WAYS.items()}
        held = {way: held_bytes(side) for way, side in sides.items()}
        seconds = time_sides(sides, rounds=1 if quick else 7)
        packing = median(share_of_packing(sides["8 bits"]) for _ in range(1 if quick else 5))
    for way in WAYS:
        yield Figure(f"{where}, {way}: held between forward and backward", held[way] / 2**20, "MiB")
        yield Figure(f"{where}, {way}: time of a step", seconds[way], "s")
    rest = held["disk"]  # the last layer, head and loss
    share = (held["8 bits"] - rest) / (held["exact products"] - rest)
    yield _at_most(f"{where}: layers in 8 bits over exact products", share, "share", HELD, not quick)
    yield _at_most(f"{where}: rounding's share of a step", packing, "share", PACKING, not quick)
    gain = seconds["computed again"] / seconds["8 bits"]
    yield Figure(f"{where}: speed in 8 bits over computing again", gain, "x")
    gain = seconds["computed again"] / seconds["disk"]
    yield Figure(f"{where}: speed from disk over computing again", gain, "x")
    keep_in(model, tokens, WAYS["8 bits"], Path())
    found = deviation(model, partial(take, model, tokens))
    assert found is not None
    yield Figure.at_most(f"{where}: relative error of the gradient in 8 bits", found.relative, "", MUCH)
    yield Figure(f"{where}: cosine of the gradient in 8 bits with the exact one", found.cosine, "")
    yield Figure(f"{where}: largest relative error of one matrix, {found.worst}", found.worst_relative, "")


def convergence(steps: int, *, has_floor: bool) -> Iterator[Figure]:
    """Final losses, exact and in 8 bits."""
    curves = {way: curve(WAYS[way], steps) for way in ("exact products", "8 bits")}
    last = max(1, steps // 10)
    ends = {way: sum(losses[-last:]) / last for way, losses in curves.items()}
    for way, end in ends.items():
        yield Figure(f"base-11m, {steps} steps: final loss, {way}", end, "nats per token")
    exact, rounded = ends.values()
    claim = f"base-11m, {steps} steps: final losses apart"
    yield _at_most(claim, abs(exact - rounded) / exact, "share", WITHIN, has_floor)


def curve(names: str, steps: int) -> list[float]:
    """The loss of each step."""
    base = {
        "model": str(shared("models/base-11m")),
        "data": {
            "train": str(shared("datasets/alpaca/alpaca_en_demo.json")),
            "eval_fraction": 0.0,
            "max_length": 1024,
        },
        "train": {"max_steps": steps, "batch_size": 8, "learning_rate": 3e-3},
    }
    config = load_config(None, base=base)
    task = prepare(config)
    model = load_base(config)
    make_trainable(model, config)
    keep_in(model, task.plan().order.most_tokens, names, Path())
    losses: list[float] = []

    class Noted:
        def start(self, total_steps: int) -> None:
            """Nothing is shown."""

        def step(self, record: Any) -> None:
            losses.append(record.loss)

        def stop(self) -> None:
            """Nothing was shown."""

    with tempfile.TemporaryDirectory() as folder:
        how = TrainRun(Path(folder), lambda _: None, config.seed, task.pad_id, display=Noted())
        train(model, task.rows.train, config.train, how)
    return losses


def keep_in(model: PreTrainedModel, tokens: int, names: str, folder: Path) -> None:
    """Have all layers but the last keep alike."""
    layers = len(fused_layers(model))
    plan_memory(model, tokens, 0, folder=folder, earlier=[names] * (layers - 1) + ["all"])


def take(model: PreTrainedModel, tokens: int) -> None:
    """Forward, loss and backward of one row."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    labels = ids.clone()
    labels[:, 0] = UNTRAINED
    given = {"input_ids": ids, "use_cache": False}
    trained_loss(model, given, labels, divisor=tokens - 1).objective.backward()


def step(model: PreTrainedModel, tokens: int) -> None:
    """The same; the gradients are dropped."""
    take(model, tokens)
    model.zero_grad(set_to_none=True)


def held_bytes(side: Callable[[], None]) -> int:
    """Bytes that autograd is given to save in a step."""
    held = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal held
        held += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        side()
    return held


def share_of_packing(side: Callable[[], None]) -> float:
    """The share of a step's processor time, over all threads, of rounding to 8 bits and back."""
    right, spent = (functions.pack, functions.unpack), 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal spent
            began = time.process_time()
            try:
                return work(*given)
            finally:
                spent += time.process_time() - began

        return call

    functions.pack, functions.unpack = map(timed, right)
    began = time.process_time()
    try:
        side()
    finally:
        functions.pack, functions.unpack = right
    return spent / (time.process_time() - began)


def _at_most(claim: str, figure: float, unit: str, floor: float, is_promised: bool) -> Figure:
    return Figure.at_most(claim, figure, unit, floor) if is_promised else Figure(claim, figure, unit)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Activations in 8 bits and on disk.", epilog="--quick and --results: as all benchmarks."
    )
    parser.add_argument("--shape", choices=SHAPES, default="1.1B, 4 layers", help="of the model")
    parser.add_argument("--tokens", type=int, default=1024, help="of the row")
    options, rest = parser.parse_known_args()
    return run("activations", partial(measure, options.shape, options.tokens), rest)


if __name__ == "__main__":
    sys.exit(main())
