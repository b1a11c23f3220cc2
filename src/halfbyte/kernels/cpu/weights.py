"""4-bit weights on the CPU: encoding, decoding and products through the compiled module.

It owns the passage of weights to the compiled kernels; it must not check arguments (that is `ops`) nor compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.quant.codebook import thresholds
from halfbyte.quant.search import FIRST_FRACTION, LAST_FRACTION, REFINEMENTS, TRIALS
from halfbyte.quant.weight import WeightParts


def block_scales(weight: Tensor, blocksize: int) -> Tensor:
    """See `reference.block_scales`."""
    scales = weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)
    native().block_scales(
        weight.data_ptr(), DTYPES[weight.dtype], weight.numel(), blocksize, scales.data_ptr(), threads()
    )
    return scales


def search_scales(weight: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    """See `reference.search_scales`."""
    scales = weight.new_empty(-(-weight.numel() // blocksize), dtype=torch.float32)
    native().search_scales(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        weight.numel(),
        blocksize,
        _sorted_codebook(codebook),
        (FIRST_FRACTION, LAST_FRACTION, TRIALS, REFINEMENTS),
        scales.data_ptr(),
        threads(),
    )
    return scales


def encode_4bit(weight: Tensor, scales: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    """See `reference.encode_4bit`."""
    codes = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    native().encode(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        weight.numel(),
        blocksize,
        _sorted_codebook(codebook),
        scales.data_ptr(),
        codes.data_ptr(),
        threads(),
    )
    return codes


def dequantize_4bit(parts: WeightParts, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize_4bit`."""
    out = parts.codes.new_empty((parts.N, parts.K), dtype=dtype)
    native().dequantize(_weight(parts), DTYPES[dtype], out.data_ptr(), threads())
    return out


def linear_4bit(x: Tensor, parts: WeightParts, bias: Tensor | None) -> Tensor:
    """See `reference.linear_4bit`."""
    y = x.new_empty(x.shape[0], parts.N)
    bias_pointer = 0 if bias is None else bias.data_ptr()
    native().linear(
        _weight(parts), DTYPES[x.dtype], x.data_ptr(), x.shape[0], bias_pointer, y.data_ptr(), threads()
    )
    return y


def linear_4bit_grad(dy: Tensor, parts: WeightParts) -> Tensor:
    """See `reference.linear_4bit_grad`."""
    dx = dy.new_empty(dy.shape[0], parts.K)
    native().linear_grad(
        _weight(parts), DTYPES[dy.dtype], dy.data_ptr(), dy.shape[0], dx.data_ptr(), threads()
    )
    return dx


def _weight(parts: WeightParts) -> tuple[int, int, int, int, int, float, int, int, int]:
    nested = (
        parts.nested_scales is not None and parts.nested_codebook is not None and parts.offset is not None
    )
    return (
        parts.codes.data_ptr(),
        parts.scales.data_ptr(),
        parts.codebook.data_ptr(),
        parts.nested_scales.data_ptr() if nested and parts.nested_scales is not None else 0,
        parts.nested_codebook.data_ptr() if nested and parts.nested_codebook is not None else 0,
        parts.offset.item() if nested and parts.offset is not None else 0.0,
        parts.blocksize,
        parts.N,
        parts.K,
    )


def _sorted_codebook(codebook: Tensor) -> tuple[list[float], list[int], list[float]]:
    """Thresholds, codes in ascending order of value, and those values, as the compiled module takes them."""
    values = codebook.numpy()
    bounds, order = thresholds(values)
    return bounds.tolist(), order.tolist(), values[order].tolist()
