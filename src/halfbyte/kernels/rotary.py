"""The rotary position embedding: its contract, argument checks, shapes and gradient.

It owns what callers may pass and what they get, registered with torch as `halfbyte::*`; it must not know which
backend computes (`backends`) nor how (`reference` is the specification).

Shapes: x (B, T, H, D) in any strides with a head's numbers next to each other, as the parts of a fused qkv have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.kernels.checks import refused, require_like, require_rows
from halfbyte.kernels.library import by_backend, define


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Turns the first R numbers of every head by its position; no autograd.

    A head's first R numbers are two halves, x1 and x2, that are turned against each other (Llama's layout):
    `x1 cos1 - x2 sin1` and `x2 cos2 + x1 sin2`, computed in float32 and rounded once, where transformers rounds both
    products and the sum. Numbers from R on are kept, as in Phi-3.

    Args:
        x: (B, T, H, D) float32, bfloat16 or float16 (float64 through the reference).
        cos: (B or 1, T, R), R even and at most D, in any of these dtypes.
        sin: Like cos.
        inverse: The transposed map instead: the gradient, and where cos and sin have equal halves the turn back.
        out: Where the result goes: x itself, or memory that does not overlap x; a new tensor if None.

    Returns:
        (B, T, H, D) in x's dtype: `out`, or a contiguous tensor.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.

    Source: RoFormer (arXiv 2104.09864), section 3.4.
    """
    _require_rotation(x, cos, sin)
    if out is None:
        turned: Tensor = torch.ops.halfbyte.rotate(x, cos, sin, inverse)
        return turned
    require_like("rotate", "out", out, x)
    if out.numel() == 0:
        return out
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise refused("rotate", "out", out, "the numbers of a head next to each other")
    torch.autograd.graph.increment_version(out)
    if out.data_ptr() == x.data_ptr() and out.stride() == x.stride():
        torch.ops.halfbyte.rotate_(out, cos, sin, inverse)
    else:
        torch.ops.halfbyte.rotate_out(x, cos, sin, inverse, out)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` into a new tensor, differentiable in `x`; cos and sin are constants."""
    turned: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, inverse=True), None, None


def _require_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    require_rows("rotate", "x", x)
    if x.dim() != 4:
        raise refused("rotate", "x", x, "(B, T, H, D)")
    B, T, _, D = x.shape
    fits = cos.dim() == 3 and cos.shape[0] in (1, B) and cos.shape[1] == T and cos.dtype.is_floating_point
    R = cos.shape[-1] if fits else 0
    wide = (cos.dtype is torch.float64) == (x.dtype is torch.float64)
    if not fits or R % 2 or not 0 < R <= D or not wide or cos.device != x.device:
        expected = f"({B} or 1, {T}, R) with R even and at most {D}, on {x.device}"
        raise refused("rotate", "cos", cos, expected)
    require_like("rotate", "sin", sin, cos)


def _empty_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _nothing(*_: Any) -> None:
    return None


_TABLES = "Tensor cos, Tensor sin, bool inverse"
_into = by_backend("rotate_into")

define("rotate", f"(Tensor x, {_TABLES}) -> Tensor", by_backend("rotate"), _empty_like)
define("rotate_", f"(Tensor(a!) x, {_TABLES}) -> ()", lambda x, *tables: _into(x, *tables, x), _nothing)
define("rotate_out", f"(Tensor x, {_TABLES}, Tensor(a!) out) -> ()", _into, _nothing)
