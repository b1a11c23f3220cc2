"""Activations and gated activations in plain PyTorch, forward and backward.

It owns the meaning of these operations, the roundings included, and is written to be read; it must not be clever.

Shapes: everything (..., F) of one dtype; `wide` is float32, or float64 for float64. Derivatives are written out:
autograd's own are what the tests compare them with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Beyond, every activation is 0 or the identity to the last bit; before, nothing overflows.
FAR = 128.0


def activation_forward(x: Tensor, kind: str) -> Tensor:
    """act(x), computed wide and rounded once; the limit at infinities.

    Args:
        x: Any shape.
        kind: `silu`, `gelu` (x times the normal distribution), `gelu_tanh` (its approximation with tanh), `relu`.
    """
    return _activated(_widened(x), kind).to(x.dtype)


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """`dy · act'(x)`, computed wide and rounded once."""
    return (_widened(dy) * _slope(_widened(x), kind)).to(x.dtype)


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`act(gate) · up`: act is computed wide and rounded, then the product is."""
    return activation_forward(gate, kind) * up


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gated_forward`: `dh · up · act'(gate)` rounded once, `dh · act(gate)` with act as it was rounded.

    Returns:
        dgate, dup, and h again, or (0) where it was not asked for.
    """
    dgate = (_widened(dh) * _widened(up) * _slope(_widened(gate), kind)).to(gate.dtype)
    act = activation_forward(gate, kind)
    return dgate, dh * act, act * up if recompute_h else gate.new_empty(0)


def gated_backward_in_place(dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool) -> Tensor:
    """`gated_backward` with dgate written over gate and dup over up; returns h, or (0)."""
    dgate, dup, h = gated_backward(dh, gate, up, kind, recompute_h)
    gate.copy_(dgate)
    up.copy_(dup)
    return h


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _activated(x: Tensor, kind: str) -> Tensor:
    x = x.clamp_min(-FAR)
    if kind == "relu":
        return F.relu(x)
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu":
        return x * _normal(x)
    # (1 + tanh u) / 2 = sigmoid(2 u).
    return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


def _slope(x: Tensor, kind: str) -> Tensor:
    if kind == "relu":
        return torch.where(x.isnan(), x, (x > 0).to(x.dtype))
    x = x.clamp(-FAR, FAR)
    if kind == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if kind == "gelu":
        return _normal(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    inner, inner_slope = x + 0.044715 * x**3, 1 + 3 * 0.044715 * x * x
    s = torch.sigmoid(math.sqrt(8 / math.pi) * inner)
    return s + x * s * (1 - s) * math.sqrt(8 / math.pi) * inner_slope


def _normal(x: Tensor) -> Tensor:
    """The normal distribution, through erfc: 1 + erf would cancel where it is near 0."""
    twice: Tensor = torch.special.erfc(-x / math.sqrt(2))
    return 0.5 * twice
