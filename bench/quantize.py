"""How fast weights are quantised, beside bitsandbytes, and how much weight error the scale search saves.

It owns the settings measured; it must not know how anything is quantised.

    python bench/quantize.py [--quick]

Speed: one bfloat16 matrix of normal numbers, double quantization and packing included, both sides in turn on all
threads. Error: the sum of squared differences over every projection matrix of real models, the same bytes for both.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from figures import Figure, run, shared, time_sides
from halfbyte.kernels import ops
from halfbyte.quant.weight import QuantSpec, Scales

MODELS = ("all-MiniLM-L6-v2-fp16", "base-11m")
ABSMAX_FLOOR = 1000.0  # M weights/s on two cores
MSE_FLOOR = 80.0
SAVED_FLOOR = 12.0  # per cent of the squared error


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    yield from speed(2048 if quick else 8192, rounds=3 if quick else 7)
    for model in MODELS:
        yield from error(model, shared(f"models/{model}/model.safetensors"))


def speed(size: int, rounds: int) -> Iterator[Figure]:
    """Weights per second for both kinds of scales and for bitsandbytes."""
    import bitsandbytes.functional as bitsandbytes

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    specs: dict[str, Scales] = {"halfbyte absmax": "absmax", "halfbyte mse": "mse"}
    sides = {
        name: lambda s=scales: ops.quantize_4bit(weight, QuantSpec(scales=s))
        for name, scales in specs.items()
    }
    theirs = "bitsandbytes"
    part = weight[: max(64, size // 8)]  # it is slower by an order of magnitude: an eighth, counted as such
    sides[theirs] = lambda: bitsandbytes.quantize_4bit(part, quant_type="nf4", compress_statistics=True)
    seconds = time_sides(sides, rounds=rounds)
    rates = {name: (part if name == theirs else weight).numel() / seconds[name] / 1e6 for name in sides}
    where = f"NF4 with double quantization, {size} x {size} bfloat16, {torch.get_num_threads()} threads"
    yield Figure.at_least(f"{where}: absmax", rates["halfbyte absmax"], "M weights/s", ABSMAX_FLOOR)
    yield Figure.at_least(f"{where}: mse", rates["halfbyte mse"], "M weights/s", MSE_FLOOR)
    yield Figure(f"{where}: bitsandbytes", rates[theirs], "M weights/s")
    yield Figure(f"{where}: absmax against bitsandbytes", rates["halfbyte absmax"] / rates[theirs], "x")


def error(model: str, path: Path) -> Iterator[Figure]:
    """Squared weight error of both kinds of scales over a model's projection matrices."""
    squared, nbytes = dict.fromkeys(("absmax", "mse"), 0.0), dict.fromkeys(("absmax", "mse"), 0)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if "embed" in name or len(file.get_slice(name).get_shape()) != 2:
                continue
            weight = file.get_tensor(name)
            for scales in ("absmax", "mse"):
                quantised = ops.quantize_4bit(weight, QuantSpec(scales=scales))
                off = ops.dequantize_4bit(quantised, torch.float32) - weight.float()
                squared[scales] += float(off.double().square().sum())
                nbytes[scales] += quantised.nbytes
    saved = 100 * (1 - squared["mse"] / squared["absmax"])
    yield Figure.at_least(f"{model}: squared weight error saved by mse scales", saved, "%", SAVED_FLOOR)
    yield Figure.at_most(
        f"{model}: bytes of mse over bytes of absmax", nbytes["mse"] / nbytes["absmax"], "x", 1.0
    )


if __name__ == "__main__":
    sys.exit(run("quantize", measure))
