"""Activations and gated activations: their contract, argument checks, shapes and gradients.

It owns what callers may pass and what they get, registered with torch as `halfbyte::*`; it must not know which
backend computes (`backends`) nor how (`reference` is the specification).

The functions named `…_forward` and `…_backward` know no autograd: they are for a caller that plans by itself what is
kept between the two. `activation` and `gated` are built on them and are differentiable once.

Shapes: everything (..., F) of one dtype, rows in any strides; results are contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.errors import KernelError
from halfbyte.kernels.checks import require_like, require_rows
from halfbyte.kernels.library import by_backend, define

# The names in use, transformers' among them, and the function each means.
KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation_forward(x: Tensor, kind: str) -> Tensor:
    """act(x), computed in float32 and rounded once; no autograd.

    `gelu_new`, which transformers rounds after every step, is the same function as `gelu_tanh` and is rounded once.

    Args:
        x: (..., F) float32, bfloat16 or float16 (float64 through the reference).
        kind: A key of `KINDS`.

    Returns:
        (..., F) in x's dtype. Infinities give the limit, NaN gives NaN.

    Raises:
        KernelError: HB402 for another dtype or kind.

    Source: Gaussian Error Linear Units (arXiv 1606.08415), section 2.
    """
    require_rows("activation", "x", x)
    y: Tensor = torch.ops.halfbyte.activation_forward(x, _kind("activation", kind))
    return y


def activation_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """`dy · act'(x)`, computed in float32 and rounded once; no autograd.

    Args:
        dy: (..., F), gradient of the result.
        x: (..., F), the argument of the forward pass.
        kind: As there.

    Returns:
        (..., F) in x's dtype.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit, or for an unknown kind.
    """
    require_rows("activation_backward", "x", x)
    require_like("activation_backward", "dy", dy, x)
    dx: Tensor = torch.ops.halfbyte.activation_backward(dy, x, _kind("activation_backward", kind))
    return dx


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`act(gate) · up`: act is computed in float32 and rounded, then the product is, as in transformers; no autograd.

    Args:
        gate: (..., F) float32, bfloat16 or float16 (float64 through the reference).
        up: Like gate; the two may be the halves of one (..., 2F) tensor.
        kind: A key of `KINDS`.

    Returns:
        h (..., F).

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit, or for an unknown kind.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202), section 2.
    """
    require_rows("gated", "gate", gate)
    require_like("gated", "up", up, gate)
    h: Tensor = torch.ops.halfbyte.gated_forward(gate, up, _kind("gated", kind))
    return h


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, *, recompute_h: bool = False, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `gated_forward` in one pass; no autograd.

    Args:
        dh: (..., F), gradient of h.
        gate: As in the forward pass.
        up: As in the forward pass.
        kind: As in the forward pass.
        recompute_h: Whether h is wanted again, to the bit what the forward pass gave.
        inplace: Whether dgate is written over gate and dup over up; nobody else may need them any more, and dh may
            not share their memory.

    Returns:
        dgate = dh · up · act'(gate), rounded once, and dup = dh · act(gate), act as the forward pass rounded it
        (gate and up themselves if `inplace`); h (..., F), or None.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit, or for an unknown kind.
    """
    require_rows("gated_backward", "gate", gate)
    require_like("gated_backward", "up", up, gate)
    require_like("gated_backward", "dh", dh, gate)
    kind = _kind("gated_backward", kind)
    if inplace:
        torch.autograd.graph.increment_version((gate, up))
        h: Tensor = torch.ops.halfbyte.gated_backward_(dh, gate, up, kind, recompute_h)
        return gate, up, h if recompute_h else None
    dgate, dup, h = torch.ops.halfbyte.gated_backward(dh, gate, up, kind, recompute_h)
    return dgate, dup, h if recompute_h else None


def activation(x: Tensor, kind: str) -> Tensor:
    """`activation_forward`, differentiable in `x`."""
    y: Tensor = _Activation.apply(x, kind)  # type: ignore[no-untyped-call]
    return y


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`gated_forward`, differentiable in `gate` and `up`."""
    h: Tensor = _Gated.apply(gate, up, kind)  # type: ignore[no-untyped-call]
    return h


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return activation_forward(x, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return activation_backward(dy, x, ctx.kind), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return gated_forward(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = gated_backward(dh, gate, up, ctx.kind)
        return dgate, dup, None


def _kind(operation: str, kind: str) -> str:
    if kind not in KINDS:
        what = f"{operation}: kind is {kind!r}, expected one of {', '.join(KINDS)}"
        raise KernelError("HB402", what, fix="use PyTorch's own function for this activation")
    return KINDS[kind]


def _empty_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _gradient_shapes(
    dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), _h_shape(dh, gate, up, kind, recompute_h)


def _h_shape(dh: Tensor, gate: Tensor, up: Tensor, kind: str, recompute_h: bool) -> Tensor:
    return gate.new_empty(gate.shape if recompute_h else 0)


define("activation_forward", "(Tensor x, str kind) -> Tensor", by_backend("activation_forward"), _empty_like)
define(
    "activation_backward",
    "(Tensor dy, Tensor x, str kind) -> Tensor",
    by_backend("activation_backward"),
    lambda dy, x, kind: _empty_like(x),
)
define(
    "gated_forward", "(Tensor gate, Tensor up, str kind) -> Tensor", by_backend("gated_forward"), _empty_like
)
define(
    "gated_backward",
    "(Tensor dh, Tensor gate, Tensor up, str kind, bool recompute_h) -> (Tensor, Tensor, Tensor)",
    by_backend("gated_backward"),
    _gradient_shapes,
)
define(
    "gated_backward_",
    "(Tensor dh, Tensor(a!) gate, Tensor(b!) up, str kind, bool recompute_h) -> Tensor",
    by_backend("gated_backward_in_place"),
    _h_shape,
)
