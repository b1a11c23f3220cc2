"""RMSNorm and LayerNorm on the CPU through the compiled module.

It owns the passage of their tensors to the compiled kernels; it must not check arguments nor compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.cpu.rows import fresh, readable

_RMS, _RMS_UNIT_OFFSET, _LAYER = 0, 1, 2  # NormKind of native/elementwise.hpp


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm_forward`."""
    kind = _RMS_UNIT_OFFSET if unit_offset else _RMS
    return _forward(x, None, None, weight, None, None, eps, kind)


def add_rms_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.add_rms_norm_forward`."""
    total = fresh(x)
    kind = _RMS_UNIT_OFFSET if unit_offset else _RMS
    return *_forward(x, residual, total, weight, None, None, eps, kind), total


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    unit_offset: bool,
    residual_grad: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm_backward`."""
    kind = _RMS_UNIT_OFFSET if unit_offset else _RMS
    dweight = _sums(x, weight_grad)
    return _backward(dy, x, weight, None, rstd, residual_grad, dweight, None, kind), dweight


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm_forward`."""
    mean = _statistic(x)
    y, rstd = _forward(x, None, None, weight, bias, mean, eps, _LAYER)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm_backward`."""
    dweight, dbias = _sums(x, weight_grad), _sums(x, weight_grad)
    dx = _backward(dy, x, weight, mean, rstd, residual_grad, dweight, dbias, _LAYER)
    return dx, dweight, dbias


def _forward(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    eps: float,
    kind: int,
) -> tuple[Tensor, Tensor]:
    """Makes y and rstd; fills `total` and `mean` where they are given."""
    if kind == _RMS and weight.dtype != x.dtype:
        y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    else:
        y = fresh(x)
    rstd = _statistic(x)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    extent, rows, _held = readable(x, y, residual, total)
    native().norm_forward(
        kind,
        eps,
        extent,
        *rows,
        (DTYPES[weight.dtype], weight.data_ptr(), 0 if bias is None else bias.data_ptr()),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        threads(),
    )
    return y, rstd


def _statistic(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    residual_grad: Tensor | None,
    dweight: Tensor,
    dbias: Tensor | None,
    kind: int,
) -> Tensor:
    """Makes dx; fills `dweight` and `dbias` where they are given and not empty."""
    dx = fresh(x)
    weight, rstd = weight.contiguous(), rstd.contiguous()
    mean = None if mean is None else mean.contiguous()
    extent, rows, _held = readable(dy, x, dx, residual_grad)
    native().norm_backward(
        kind,
        extent,
        *rows,
        (DTYPES[weight.dtype], weight.data_ptr(), 0),
        0 if mean is None else mean.data_ptr(),
        rstd.data_ptr(),
        dweight.data_ptr(),  # 0 where it is empty
        0 if dbias is None else dbias.data_ptr(),
        threads(),
    )
    return dx


def _sums(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty(x.shape[-1] if wanted else 0, dtype=torch.float32)
