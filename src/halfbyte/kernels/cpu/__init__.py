"""The operations on CPU tensors through the compiled module, one function per operation.

It owns which dtypes the compiled module takes; it must not check arguments nor compute.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.cpu.calls import DTYPES
from halfbyte.kernels.cpu.linear import linear, linear_grad
from halfbyte.kernels.cpu.weights import (
    block_scales,
    dequantize_4bit,
    encode_4bit,
    search_scales,
)
from halfbyte.kernels.native import module

__all__ = [
    "block_scales",
    "dequantize_4bit",
    "encode_4bit",
    "linear",
    "linear_grad",
    "search_scales",
    "supports",
]


def supports(dtype: torch.dtype) -> bool:
    """Whether the compiled module is in use and takes this dtype."""
    return dtype in DTYPES and module() is not None
