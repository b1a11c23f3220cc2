"""Timing this machine: passes of a model's real shape with random weights, memory, and the disk.

It owns these measurements, each bounded to seconds; it must not know what is forecast from them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from halfbyte.data.pack import pack
from halfbyte.data.tokenise import Example
from halfbyte.kernels import limits, native
from halfbyte.model.blocks import fused_layers
from halfbyte.model.direct import aligned_bytes, read_direct
from halfbyte.model.files import CONFIG
from halfbyte.model.layer import Keep
from halfbyte.model.linear4bit import Linear4bit, features, is_conv1d
from halfbyte.model.precision import computing_dtype
from halfbyte.model.quantised_file import bytes_of
from halfbyte.model.skeleton import build_skeleton, slots
from halfbyte.model.speeds import disk_speeds
from halfbyte.plan.loaded import open_for_plan
from halfbyte.plan.time import Speeds, Timing
from halfbyte.plan.work import Sizes, Work
from halfbyte.quant.weight import QuantSpec, Weight4bit
from halfbyte.system import keep_freed_memory
from halfbyte.train.methods import autocast_dtype, make_trainable
from halfbyte.train.step import RowNames, accumulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.settings import Config

PASS_SECONDS = 1.0
"""About how long a timed pass may take; longer ones are timed with fewer tokens."""

LEAST_TOKENS = 64
LAYERS_SECONDS, MOST_LAYERS = 0.2, 8
"""How long the layers of a timed pass take at least together, unless these are many: one that takes a few
milliseconds is not told from noise."""
ROUNDS, ROUNDS_SECONDS = (5, 25), 2.0
"""Of the timed passes, least and most, and about how long all of them may take."""
FILE_BYTES = 128 << 20


def measure_speeds(folder: Path) -> Speeds:
    """Arithmetic, memory and disk.

    Args:
        folder: On the disk that is to be measured; a file is written there and removed.
    """
    dtype = computing_dtype("auto")
    disk = _disk(folder)
    if native.module() is None:
        return Speeds(_products(dtype), _copying(), *disk)
    return Speeds(limits.peak_flops(dtype), limits.read_bandwidth(1 << 28), *disk)


def measure_passes(config: Config, sizes: Sizes, work: Work, speeds: Speeds) -> Timing:
    """Passes of one layer and of a few, by what layers keep: their differences are a layer, and the rest.

    Passes of every kind take turns, and each one's middle counts: what disturbs the machine disturbs all alike.

    Args:
        config: Settings of the run.
        sizes: Of its model.
        work: What it has to do.
        speeds: Of this machine, by which the tokens of a pass are bounded.
    """
    tokens = _affordable(sizes, work, speeds)
    rows = max(1, round(tokens / min(tokens, work.row_tokens)))
    each = max(2, tokens // rows)
    example = Example(np.zeros(each, np.int32), np.ones(each, bool), None, None, "", "", truncated=False)
    batch = pack([example] * rows)
    autocast = autocast_dtype(config)

    def passes(model: PreTrainedModel, keep: Keep) -> Callable[[], None]:
        def once() -> None:
            for layer in fused_layers(model):
                layer.keep = keep  # type: ignore[assignment]
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                accumulate(model, batch, batch.trained_tokens, RowNames())
            model.zero_grad(set_to_none=True)

        return once

    keep_freed_memory()  # as training does
    more = _worth_timing(sizes, tokens, speeds)
    short, long = _model(config, 1), _model(config, 1 + more)
    keeps = (Keep.ALL, Keep.COSTLY, Keep.INPUT)
    one, *several = _middles([passes(short, Keep.ALL), *(passes(long, keep) for keep in keeps)])
    layer = max((several[0] - one) / more, 0.05 * one)
    again = [max(0.0, seconds - several[0]) / (1 + more) for seconds in several]
    found = {keep.name.lower(): layer + extra for keep, extra in zip(keeps, again, strict=True)}
    return Timing(batch.tokens, each, found, max(0.0, one - layer))


def _worth_timing(sizes: Sizes, tokens: int, speeds: Speeds) -> int:
    """How many layers more than one a pass needs for their time to be told from noise."""
    layer = tokens * 4 * sizes.linear / max(1, sizes.layers) / speeds.flops
    return max(1, min(MOST_LAYERS, sizes.layers - 1, round(LAYERS_SECONDS / layer)))


def _affordable(sizes: Sizes, work: Work, speeds: Speeds) -> int:
    """Tokens of a pass of two layers that takes about as long as it may."""
    per_token = 4 * 2 * sizes.linear / max(1, sizes.layers) + 4 * sizes.head
    most = PASS_SECONDS * 0.6 * speeds.flops / max(1.0, per_token)
    return int(max(LEAST_TOKENS, min(work.tokens_per_pass, most)))


def _model(config: Config, layers: int) -> PreTrainedModel:
    """A model of the shape with so many layers and random weights, as its method trains it."""
    folder = open_for_plan(config.model)
    settings: dict[str, Any] = dict(folder.config)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in settings:
            settings[name] = layers
    if isinstance(settings.get("layer_types"), list):
        settings["layer_types"] = settings["layer_types"][:layers]
    dtype = torch.float32 if config.method == "full" else computing_dtype(config.dtype)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        model = build_skeleton(replace(folder, path=Path(name), config=settings, tensors={}), dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _fill(model, QuantSpec(**config.quantization.model_dump()) if config.method == "qlora" else None)
        if config.method != "full":
            model.requires_grad_(False)
        make_trainable(model, config)
    model.train()
    return model


def _fill(model: PreTrainedModel, spec: QuantSpec | None) -> None:
    for slot in slots(model):
        if spec is not None and slot.linear is not None:
            name = slot.names[0].removesuffix(".weight")
            layer = Linear4bit(
                _random_weight(features(slot.linear), spec, slot.dtype), from_conv1d=is_conv1d(slot.linear)
            )
            model.set_submodule(name, layer)
            continue
        if not slot.is_meta:
            continue
        # An embedding's pages are there once they are touched: few are.
        held = torch.zeros(slot.shape, dtype=slot.dtype)
        if not slot.is_embedding:
            held.normal_(0.0, 0.02)
        value = nn.Parameter(held, requires_grad=held.is_floating_point()) if slot.is_parameter else held
        for name in slot.names:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, value)


def _random_weight(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype) -> Weight4bit:
    from halfbyte.kernels.ops import quantize_4bit

    N, K = shape
    small = quantize_4bit(torch.randn(1, 256 * spec.blocksize), spec)  # one nested block
    blocks = -(-N * K // spec.blocksize)
    parts = {
        "codes": torch.randint(0, 256, ((N * K + 1) // 2,), dtype=torch.uint8),
        "scales": small.scales.repeat(-(-blocks // 256))[:blocks].contiguous(),
        "codebook": small.codebook,
    }
    if small.nested_scales is not None:
        parts["nested_scales"] = small.nested_scales.repeat(-(-blocks // 256)).contiguous()
        parts |= {"nested_codebook": small.nested_codebook, "offset": small.offset}  # type: ignore[dict-item]
    return Weight4bit(shape=shape, dtype=dtype, format=spec.format, blocksize=spec.blocksize, **parts)


def _middles(works: list[Callable[[], None]]) -> list[float]:
    """Median seconds of each work, done in turn; the first turn is a rehearsal."""
    least, most = ROUNDS
    found: list[list[float]] = [[] for _ in works]
    began = time.perf_counter()
    while len(found[0]) <= least or (len(found[0]) <= most and time.perf_counter() - began < ROUNDS_SECONDS):
        for work, seconds in zip(works, found, strict=True):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return [median(seconds[1:]) for seconds in found]


def _products(dtype: torch.dtype) -> float:
    a = torch.ones(512, 1024, dtype=dtype)
    return 2 * 512 * 1024 * 512 / _middles([lambda: _void(a @ a.T)])[0]


def _copying() -> float:
    memory = torch.ones(1 << 25)
    return memory.nbytes / _middles([lambda: _void(memory.sum())])[0]


def _void(_: object) -> None:
    """Drops a result."""


def _disk(folder: Path) -> tuple[float | None, float | None, float | None]:
    """Bytes per second of reading and writing a file that no cache holds, and of reading past it; None where that
    cannot be had."""
    if not hasattr(os, "posix_fadvise"):
        return None, None, None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write, read = disk_speeds(folder, FILE_BYTES)
        return read, write, _direct(folder)
    except OSError:  # a full disk
        return None, None, None


def _direct(folder: Path) -> float | None:
    """Bytes per second of reading past the system's cache."""
    into = bytes_of(aligned_bytes(FILE_BYTES).fill_(1))  # there, before the disk is waited for
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(into)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        done = read_direct(Path(file.name), 0, into)
        seconds = time.perf_counter() - began
    return FILE_BYTES / seconds if done == FILE_BYTES else None
