"""Every operation in plain PyTorch: the specification that all other backends are tested against.

It owns the meaning of the operations; it must not know another backend.
"""

from halfbyte.kernels.reference.linear import linear, linear_grad
from halfbyte.kernels.reference.weights import (
    block_scales,
    dequantize_4bit,
    encode_4bit,
    search_scales,
)

__all__ = [
    "block_scales",
    "dequantize_4bit",
    "encode_4bit",
    "linear",
    "linear_grad",
    "search_scales",
]
