"""Every operation in plain PyTorch: the specification that all other backends are tested against.

It owns the meaning of the operations; it must not know another backend.
"""

from halfbyte.kernels.reference.activations import (
    activation_backward,
    activation_forward,
    gated_backward,
    gated_backward_in_place,
    gated_forward,
)
from halfbyte.kernels.reference.adamw import adamw_8bit_
from halfbyte.kernels.reference.attention import attention, attention_grad
from halfbyte.kernels.reference.linear import linear, linear_grad
from halfbyte.kernels.reference.loss import loss_rows
from halfbyte.kernels.reference.norms import (
    add_rms_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from halfbyte.kernels.reference.rotary import rotate, rotate_into
from halfbyte.kernels.reference.weights import (
    block_scales,
    dequantize_4bit,
    encode_4bit,
    search_scales,
)

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
]
