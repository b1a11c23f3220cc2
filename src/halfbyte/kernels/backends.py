"""Which backend runs an operation, and why.

It owns the choice, the only place that names a backend; it must not know what an operation means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from halfbyte.kernels import cpu, reference
from halfbyte.kernels.native import module, notice


class Choice(NamedTuple):
    """What `halfbyte doctor` prints for one operation and dtype."""

    operation: str
    dtype: str
    backend: str
    why: str


OPERATIONS = (
    "block_scales",
    "search_scales",
    "encode_4bit",
    "dequantize_4bit",
    "linear",
    "linear_grad",
    "rms_norm_forward",
    "add_rms_norm_forward",
    "rms_norm_backward",
    "layer_norm_forward",
    "layer_norm_backward",
    "rotate",
    "rotate_into",
    "activation_forward",
    "activation_backward",
    "gated_forward",
    "gated_backward",
    "gated_backward_in_place",
    "loss_rows",
    "attention",
    "attention_grad",
    "adamw_8bit_",
)


def implementation(
    operation: str, dtype: torch.dtype, device: torch.device | None = None
) -> Callable[..., Any]:
    """The function that computes `operation` on tensors of `dtype`, on the CPU unless another device is named."""
    on_cpu = device is None or device.type == "cpu"
    backend = cpu if on_cpu and cpu.supports(dtype) else reference
    function: Callable[..., Any] = getattr(backend, operation)
    return function


def describe() -> list[Choice]:
    """For every operation and dtype: which backend runs and why."""
    choices = []
    native = module()
    for operation in OPERATIONS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            if native is None:
                choices.append(Choice(operation, name, "reference", notice() or ""))
            else:
                isa = native.active()
                multiply = operation.startswith(("linear", "attention")) and dtype is torch.bfloat16
                bf16 = "vdpbf16ps products" if multiply and isa == "avx512_bf16" else "float32 arithmetic"
                choices.append(Choice(operation, name, f"native/{isa}", bf16))
    return choices
