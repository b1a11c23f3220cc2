"""Activations and gated activations on the CPU through the compiled module.

It owns the passage of their tensors to the compiled kernels; it must not check arguments nor compute.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.cpu.calls import native, threads
from halfbyte.kernels.cpu.rows import ABSENT, fresh, layout, readable

_KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}  # Activation of native/elementwise.hpp


def activation_forward(x: Tensor, kind: str) -> Tensor:
    """See `reference.activation_forward`."""
    y = fresh(x)
    extent, (from_x, to_y), _held = readable(x, y, flat=True)
    native().gate_forward(_KINDS[kind], extent, from_x, ABSENT, to_y, threads())
    return y


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """See `reference.activation_backward`."""
    dx = fresh(x)
    extent, (from_dy, from_x, to_dx), _held = readable(dy, x, dx, flat=True)
    native().gate_backward(_KINDS[kind], extent, from_dy, from_x, ABSENT, to_dx, ABSENT, ABSENT, threads())
    return dx


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """See `reference.gated_forward`."""
    h = fresh(gate)
    extent, rows, _held = readable(gate, up, h, flat=True)
    native().gate_forward(_KINDS[kind], extent, *rows, threads())
    return h


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gated_backward`."""
    dgate, dup = fresh(gate), fresh(gate)
    h = fresh(gate) if recompute_h else None
    extent, rows, _held = readable(dh, gate, up, dgate, dup, h, flat=True)
    native().gate_backward(_KINDS[kind], extent, *rows, threads())
    return dgate, dup, gate.new_empty(0) if h is None else h


def gated_backward_in_place(dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool) -> Tensor:
    """See `reference.gated_backward_in_place`."""
    h = fresh(gate) if recompute_h else None
    if dh.stride(-1) != 1:
        dh = dh.contiguous()
    found = layout(dh, gate, up, gate, up, h, flat=True)
    if found is None:
        dgate, dup, again = gated_backward(dh, gate, up, kind, recompute_h)
        gate.copy_(dgate)
        up.copy_(dup)
        return again
    extent, rows = found
    native().gate_backward(_KINDS[kind], extent, *rows, threads())
    return gate.new_empty(0) if h is None else h
