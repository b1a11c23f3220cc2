"""RMSNorm and LayerNorm in plain PyTorch, forward and backward.

It owns the meaning of these operations, the roundings included, and is written to be read; it must not be clever.

Shapes: x (..., D); `wide` is float32, or float64 for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """`x / √(mean(x²) + eps)` times `weight`.

    Without `unit_offset` (Llama, Mistral, Qwen, Phi-3) the normalised value is rounded to x's dtype and multiplied
    by the weight in the dtype both promote to. With it (Gemma) everything is wide, the factor is 1 + weight, and
    only the result is rounded, to x's dtype.

    Returns:
        y (..., D), and rstd (...) wide.
    """
    wide = _widened(x)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normalised = wide * rstd[..., None]
    if unit_offset:
        return (normalised * (1 + weight.to(wide.dtype))).to(x.dtype), rstd
    return normalised.to(x.dtype) * weight, rstd


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm_forward` of `x + residual`, rounded to x's dtype; returns y, rstd, and that sum."""
    total = x + residual
    return *rms_norm_forward(total, weight, eps, unit_offset), total


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    unit_offset: bool,
    residual_grad: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm_forward`, wide until the one rounding of dx.

    With n = x · rstd and m = dy · weight (or 1 + weight): dx = rstd · (m - n · mean(m · n)) + residual_grad, and
    dweight = sum of dy · n over rows, n rounded as the forward pass rounded it.

    Returns:
        dx (..., D) in x's dtype, and dweight (D) wide, or (0) where it was not asked for.
    """
    n = _widened(x) * rstd[..., None]
    wide_dy = dy.to(n.dtype)
    m = wide_dy * (weight.to(n.dtype) + (1 if unit_offset else 0))
    dx = rstd[..., None] * (m - n * (m * n).mean(-1, keepdim=True))
    factor = n if unit_offset else n.to(x.dtype).to(n.dtype)
    dweight = _sum_of_rows(wide_dy * factor) if weight_grad else n.new_empty(0)
    return _with_residual(dx, residual_grad).to(x.dtype), dweight


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(x - mean) / √(variance + eps) · weight + bias`, wide until the one rounding of the result.

    Returns:
        y (..., D) in x's dtype, mean (...) and rstd (...) wide.
    """
    wide = _widened(x)
    mean = wide.mean(-1)
    centred = wide - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype), mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm_forward`, wide until the one rounding of dx.

    With n = (x - mean) · rstd and m = dy · weight: dx = rstd · (m - mean(m) - n · mean(m · n)) + residual_grad.

    Returns:
        dx (..., D) in x's dtype; dweight and dbias (D) wide, or (0) where they were not asked for.
    """
    n = (_widened(x) - mean[..., None]) * rstd[..., None]
    wide_dy = dy.to(n.dtype)
    m = wide_dy * weight.to(n.dtype)
    dx = rstd[..., None] * (m - m.mean(-1, keepdim=True) - n * (m * n).mean(-1, keepdim=True))
    dweight = _sum_of_rows(wide_dy * n) if weight_grad else n.new_empty(0)
    dbias = _sum_of_rows(wide_dy) if weight_grad else n.new_empty(0)
    return _with_residual(dx, residual_grad).to(x.dtype), dweight, dbias


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _with_residual(dx: Tensor, residual_grad: Tensor | None) -> Tensor:
    return dx if residual_grad is None else dx + residual_grad.to(dx.dtype)


def _sum_of_rows(rows: Tensor) -> Tensor:
    return rows.reshape(-1, rows.shape[-1]).sum(0)
