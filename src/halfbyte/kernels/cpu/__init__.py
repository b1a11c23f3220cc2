"""The operations on CPU tensors through the compiled module, one function per operation.

It owns which dtypes the compiled module takes; it must not check arguments nor compute.
"""

from __future__ import annotations

import torch

from halfbyte.kernels.cpu.activations import (
    activation_backward,
    activation_forward,
    gated_backward,
    gated_backward_in_place,
    gated_forward,
)
from halfbyte.kernels.cpu.adamw import adamw_8bit_
from halfbyte.kernels.cpu.attention import attention, attention_grad
from halfbyte.kernels.cpu.calls import DTYPES
from halfbyte.kernels.cpu.linear import linear, linear_grad
from halfbyte.kernels.cpu.loss import loss_rows
from halfbyte.kernels.cpu.norms import (
    add_rms_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from halfbyte.kernels.cpu.rotary import rotate, rotate_into
from halfbyte.kernels.cpu.weights import (
    block_scales,
    dequantize_4bit,
    encode_4bit,
    search_scales,
)
from halfbyte.kernels.native import module

__all__ = [
    "activation_backward",
    "activation_forward",
    "adamw_8bit_",
    "add_rms_norm_forward",
    "attention",
    "attention_grad",
    "block_scales",
    "dequantize_4bit",
    "encode_4bit",
    "gated_backward",
    "gated_backward_in_place",
    "gated_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear",
    "linear_grad",
    "loss_rows",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotate",
    "rotate_into",
    "search_scales",
    "supports",
]


def supports(dtype: torch.dtype) -> bool:
    """Whether the compiled module is in use and takes this dtype."""
    return dtype in DTYPES and module() is not None
