"""RMSNorm and LayerNorm: their contract, argument checks, shapes and gradients.

It owns what callers may pass and what they get, registered with torch as `halfbyte::*`; it must not know which
backend computes (`backends`) nor how (`reference` is the specification).

The functions named `…_forward` and `…_backward` know no autograd: they are for a caller that plans by itself what is
kept between the two. `rms_norm`, `add_rms_norm` and `layer_norm` are built on them and are differentiable once.

Shapes: x (..., D), rows in any strides; results are contiguous. `wide` is float32, or float64 for float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.kernels.checks import refused, require_like, require_rows, require_shape
from halfbyte.kernels.library import by_backend, define

_SCHEMAS = {
    "rms_norm_forward": "(Tensor x, Tensor weight, float eps, bool unit_offset) -> (Tensor, Tensor)",
    "add_rms_norm_forward": (
        "(Tensor x, Tensor residual, Tensor weight, float eps, bool unit_offset) -> (Tensor, Tensor, Tensor)"
    ),
    "rms_norm_backward": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool unit_offset, Tensor? residual_grad, "
        "bool weight_grad) -> (Tensor, Tensor)"
    ),
    "layer_norm_forward": "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    "layer_norm_backward": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? residual_grad, "
        "bool weight_grad) -> (Tensor, Tensor, Tensor)"
    ),
}


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """`x / √(mean(x²) + eps) · weight` with one of the two published roundings; no autograd.

    Args:
        x: (..., D) float32, bfloat16 or float16 (float64 through the reference), D > 0.
        weight: (D); may have another of these dtypes than x.
        eps: Added to the mean square.
        unit_offset: Gemma's norm: everything wide, times 1 + weight, one rounding to x's dtype. Otherwise Llama's,
            also Mistral's, Qwen's and Phi-3's: the normalised value is rounded to x's dtype, and its product with
            the weight to the dtype that both promote to.

    Returns:
        y (..., D), and rstd (...) wide, which the backward function takes.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.

    Source: Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """
    _require_normed("rms_norm", x, weight)
    y, rstd = torch.ops.halfbyte.rms_norm_forward(x, weight, eps, unit_offset)
    return y, rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_forward` of `x + residual` in the same pass; no autograd.

    Args:
        x: (..., D).
        residual: Like x.
        weight: See `rms_norm_forward`; likewise `eps` and `unit_offset`.
        eps: See there.
        unit_offset: See there.

    Returns:
        y and rstd as there, and the sum (..., D), rounded to x's dtype, which is what was normalised.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.
    """
    _require_normed("add_rms_norm", x, weight)
    require_like("add_rms_norm", "residual", residual, x)
    y, rstd, total = torch.ops.halfbyte.add_rms_norm_forward(x, residual, weight, eps, unit_offset)
    return y, rstd, total


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    unit_offset: bool = False,
    residual_grad: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm_forward`; no autograd.

    Args:
        dy: (..., D), gradient of y, in y's dtype.
        x: What was normalised, the sum where there was a residual.
        weight: As in the forward pass.
        rstd: From the forward pass.
        unit_offset: As in the forward pass.
        residual_grad: Like x, what else flows into it (the residual stream's gradient): added before the rounding.
        weight_grad: Whether the weight's gradient is wanted.

    Returns:
        dx (..., D) in x's dtype, computed wide and rounded once; and dweight (D) wide, summed in an order that does
        not depend on the number of threads, or None.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.
    """
    dtype = _output_dtype(x, weight, unit_offset)
    _require_backward("rms_norm_backward", dy, x, weight, residual_grad, dtype)
    _require_statistic("rms_norm_backward", "rstd", rstd, x)
    dx, dweight = torch.ops.halfbyte.rms_norm_backward(
        dy, x, weight, rstd, unit_offset, residual_grad, weight_grad
    )
    return dx, dweight if weight_grad else None


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(x - mean) / √(variance + eps) · weight + bias`, wide until the one rounding to x's dtype; no autograd.

    Args:
        x: (..., D) float32, bfloat16 or float16 (float64 through the reference), D > 0.
        weight: (D); may have another of these dtypes than x.
        bias: (D) like weight, or None.
        eps: Added to the variance.

    Returns:
        y (..., D), mean (...) and rstd (...) wide, which the backward function takes.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.

    Source: Layer Normalization (arXiv 1607.06450), equation 4.
    """
    _require_normed("layer_norm", x, weight)
    if bias is not None:
        require_like("layer_norm", "bias", bias, weight)
    y, mean, rstd = torch.ops.halfbyte.layer_norm_forward(x, weight, bias, eps)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual_grad: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm_forward`; no autograd.

    Args:
        dy: (..., D), gradient of y.
        x: What was normalised.
        weight: As in the forward pass.
        mean: From the forward pass.
        rstd: From the forward pass.
        residual_grad: Like x, what else flows into it: added before the rounding.
        weight_grad: Whether the gradients of weight and bias are wanted.

    Returns:
        dx (..., D) in x's dtype, computed wide and rounded once; dweight and dbias (D) wide, summed in an order that
        does not depend on the number of threads, or None.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.
    """
    _require_backward("layer_norm_backward", dy, x, weight, residual_grad, x.dtype)
    _require_statistic("layer_norm_backward", "mean", mean, x)
    _require_statistic("layer_norm_backward", "rstd", rstd, x)
    dx, dweight, dbias = torch.ops.halfbyte.layer_norm_backward(
        dy, x, weight, mean, rstd, residual_grad, weight_grad
    )
    return dx, dweight if weight_grad else None, dbias if weight_grad else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """`rms_norm_forward`'s y, differentiable in `x` and `weight`."""
    y: Tensor = _RmsNorm.apply(x, weight, eps, unit_offset)  # type: ignore[no-untyped-call]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_forward`'s y and sum, differentiable in `x`, `residual` and `weight`."""
    y, total = _AddRmsNorm.apply(x, residual, weight, eps, unit_offset)  # type: ignore[no-untyped-call]
    return y, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm_forward`'s y, differentiable in `x`, `weight` and `bias`."""
    y: Tensor = _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, unit_offset=unit_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.unit_offset = unit_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy, x, weight, rstd, unit_offset=ctx.unit_offset, weight_grad=ctx.needs_input_grad[1]
        )
        return dx, _as(dweight, weight), None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool
    ) -> tuple[Tensor, Tensor]:
        y, rstd, total = add_rms_norm_forward(x, residual, weight, eps, unit_offset=unit_offset)
        ctx.save_for_backward(total, weight, rstd)
        ctx.unit_offset = unit_offset
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy,
            total,
            weight,
            rstd,
            unit_offset=ctx.unit_offset,
            residual_grad=dtotal,
            weight_grad=ctx.needs_input_grad[2],
        )
        return dx, dx, _as(dweight, weight), None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[1:3])
        dx, dweight, dbias = layer_norm_backward(dy, x, weight, mean, rstd, weight_grad=wanted)
        return dx, _as(dweight, weight), _as(dbias, weight) if ctx.has_bias else None, None


def _as(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(weight.dtype)


def _require_normed(operation: str, x: Tensor, weight: Tensor) -> None:
    require_rows(operation, "x", x)
    if x.shape[-1] == 0:
        raise refused(operation, "x", x, "rows of at least one number")
    require_shape(operation, "weight", weight, x, x.shape[-1:])


def _require_backward(
    operation: str, dy: Tensor, x: Tensor, weight: Tensor, residual_grad: Tensor | None, dtype: torch.dtype
) -> None:
    _require_normed(operation, x, weight)
    if dy.dtype != dtype or dy.shape != x.shape or dy.device != x.device:
        raise refused(operation, "dy", dy, f"{tuple(x.shape)} {dtype} on {x.device}")
    if residual_grad is not None:
        require_like(operation, "residual_grad", residual_grad, x)


def _output_dtype(x: Tensor, weight: Tensor, unit_offset: bool) -> torch.dtype:
    return x.dtype if unit_offset else torch.promote_types(x.dtype, weight.dtype)


def _require_statistic(operation: str, name: str, statistic: Tensor, x: Tensor) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    if statistic.dtype != wide or statistic.shape != x.shape[:-1] or statistic.device != x.device:
        raise refused(operation, name, statistic, f"{tuple(x.shape[:-1])} {wide} on {x.device}")


def _wide_empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _rms_shapes(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_output_dtype(x, weight, unit_offset)), _wide_empty(x, *x.shape[:-1])


def _add_rms_shapes(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return *_rms_shapes(x, weight, eps, unit_offset), x.new_empty(x.shape)


def _layer_shapes(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _wide_empty(x, *x.shape[:-1]), _wide_empty(x, *x.shape[:-1])


def _rms_gradient_shapes(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _wide_empty(x, x.shape[-1] if rest[-1] else 0)


def _layer_gradient_shapes(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    width = x.shape[-1] if rest[-1] else 0
    return x.new_empty(x.shape), _wide_empty(x, width), _wide_empty(x, width)


_SHAPES: dict[str, Callable[..., Any]] = {
    "rms_norm_forward": _rms_shapes,
    "add_rms_norm_forward": _add_rms_shapes,
    "rms_norm_backward": _rms_gradient_shapes,
    "layer_norm_forward": _layer_shapes,
    "layer_norm_backward": _layer_gradient_shapes,
}
for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, by_backend(_name), _SHAPES[_name])
