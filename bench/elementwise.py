"""How fast the element-wise and row-wise operations of a transformer block are, beside a plain copy and beside torch.

It owns the settings measured; it must not know how anything is computed.

    python bench/elementwise.py [--quick]

Pace: bytes that must be read and written, once each, per second, for bfloat16 rows of a SwiGLU model's width, as a
share of what copying a tensor larger than the caches reaches in the same run. Against torch: the same result by
torch's own operations, as transformers writes it. Small: microseconds per call for the single row of a decoding step.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from figures import Figure, run, time_sides
from halfbyte.kernels import activations, norms, rotary

WIDTH, HEADS, HEAD = 5632, 32, 64
COPIED_BYTES = 256 * 2**20
# Shares of the copy's pace; what holds an exponential is held up by arithmetic, not by memory.
ROW_FLOOR, ROTARY_FLOOR, HEADS_FLOOR, GATE_FLOOR = 0.5, 0.7, 0.3, 0.35
SMALL_FLOOR_US = 40.0


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    keep_freed_memory()
    rounds = 7 if quick else 31
    source, target = (
        torch.zeros(COPIED_BYTES, dtype=torch.uint8),
        torch.zeros(COPIED_BYTES, dtype=torch.uint8),
    )
    copied = (
        2 * COPIED_BYTES / time_sides({"copy": lambda: target.copy_(source)}, rounds=rounds)["copy"] / 1e9
    )
    threads = f"{torch.get_num_threads()} threads"
    yield Figure(f"copy of {COPIED_BYTES // 2**20} MiB, {threads}", copied, "GB/s")
    for rows in (512, 2048):
        where = f"{rows} rows of bfloat16, {threads}"
        for name, (ours, theirs, nbytes, floor) in sides(rows).items():
            seconds = time_sides({"ours": ours, "theirs": theirs}, rounds=rounds, warmup=2)
            pace = nbytes / seconds["ours"] / 1e9
            yield Figure(f"{name}, {where}", pace, "GB/s")
            yield Figure.at_least(f"{name}, {where}: share of the copy's pace", pace / copied, "x", floor)
            yield Figure.at_least(
                f"{name}, {where}: against torch", seconds["theirs"] / seconds["ours"], "x", 1.0
            )
    yield from small(rounds)


def keep_freed_memory() -> None:
    """Tells glibc to use freed memory again: otherwise both sides mostly wait for fresh pages to be zeroed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


Sides = tuple[Callable[[], object], Callable[[], object], int, float]


def sides(rows: int) -> dict[str, Sides]:
    """Ours, torch's, bytes that must move, floor of the pace's share, by name."""
    x, other, up = (torch.randn(rows, WIDTH).bfloat16() for _ in range(3))
    weight = torch.randn(WIDTH).bfloat16()
    _, rstd = norms.rms_norm_forward(x, weight, 1e-6)
    heads = torch.randn(1, rows, HEADS, HEAD).bfloat16()
    cos, sin = (torch.randn(1, rows, HEAD).bfloat16() for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (x, up)]
    normalised, h = llama_norm(leaves[0], weight), F.silu(leaves[0]) * leaves[1]
    layer_weight = torch.randn(WIDTH).bfloat16()
    one = x.numel() * x.element_size()
    turned = heads.numel() * heads.element_size()
    return {
        "RMSNorm": (
            lambda: norms.rms_norm_forward(x, weight, 1e-6),
            lambda: llama_norm(x, weight),
            2 * one,
            ROW_FLOOR,
        ),
        "residual and RMSNorm": (
            lambda: norms.add_rms_norm_forward(x, other, weight, 1e-6),
            lambda: llama_norm(x + other, weight),
            4 * one,
            ROW_FLOOR,
        ),
        "RMSNorm backward with residual": (
            lambda: norms.rms_norm_backward(other, x, weight, rstd, residual_grad=up),
            lambda: torch.autograd.grad(normalised, leaves[0], other, retain_graph=True)[0] + up,
            4 * one,
            ROW_FLOOR,
        ),
        "RMSNorm of heads": (
            lambda: norms.rms_norm_forward(heads, weight[:HEAD], 1e-6),
            lambda: llama_norm(heads, weight[:HEAD]),
            2 * turned,
            HEADS_FLOOR,
        ),
        "LayerNorm": (
            lambda: norms.layer_norm_forward(x, layer_weight, layer_weight, 1e-5),
            lambda: F.layer_norm(x, (WIDTH,), layer_weight, layer_weight),
            2 * one,
            ROW_FLOOR,
        ),
        "rotary in place": (
            lambda: rotary.rotate(heads, cos, sin, out=heads),
            lambda: turn(heads, cos, sin),
            2 * turned,
            ROTARY_FLOOR,
        ),
        "SwiGLU": (
            lambda: activations.gated_forward(x, up, "silu"),
            lambda: F.silu(x) * up,
            3 * one,
            GATE_FLOOR,
        ),
        "SwiGLU backward with h": (
            lambda: activations.gated_backward(other, x, up, "silu", recompute_h=True),
            lambda: (*torch.autograd.grad(h, leaves, other, retain_graph=True), F.silu(x) * up),
            6 * one,
            GATE_FLOOR,
        ),
    }


def small(rounds: int) -> Iterator[Figure]:
    """Microseconds per call for one row."""
    for name, (ours, theirs, _, _) in sides(1).items():
        if "backward" in name:
            continue
        with torch.no_grad():
            seconds = time_sides({"ours": ours, "theirs": theirs}, rounds=rounds, calls=200)
        where = f"{name}, one row of bfloat16"
        yield Figure.at_most(where, 1e6 * seconds["ours"], "us", SMALL_FLOOR_US)
        yield Figure(f"{where}: torch", 1e6 * seconds["theirs"], "us")


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as transformers computes it for Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as transformers computes it."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-x2, x1], dim=-1) * sin[:, :, None]


if __name__ == "__main__":
    sys.exit(run("elementwise", measure))
