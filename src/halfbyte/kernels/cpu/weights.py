"""4-bit weights on the CPU: encoding and decoding through the compiled module.

It owns the passage of weights to the compiled kernels; it must not check arguments (that is `ops`) nor compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.cpu.linear import weight_tuple
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
    native().dequantize(weight_tuple(parts), DTYPES[dtype], out.data_ptr(), threads())
    return out


def _sorted_codebook(codebook: Tensor) -> tuple[list[float], list[int], list[float]]:
    """Thresholds, codes in ascending order of value, and those values, as the compiled module takes them."""
    values = codebook.numpy()
    bounds, order = thresholds(values)
    return bounds.tolist(), order.tolist(), values[order].tolist()
