"""A step of AdamW with its averages in 8 bits: its contract, argument checks and form.

It owns what callers may pass and what they get, registered with torch as `halfbyte::adamw_8bit_`; it must not know
which backend computes (`backends`) nor how (`reference` is the specification).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.checks import refused
from halfbyte.kernels.library import by_backend, define

STATE_BLOCK = 256
"""Numbers that share a scale."""


class State8bit(NamedTuple):
    """The averages of AdamW for N numbers: a code for each number, a scale for each block of `STATE_BLOCK`.

    Zeros throughout are averages of nothing yet: whatever the code, a scale of 0 makes it 0.

    Attributes:
        exp_avg: (N,) uint8, codes of the signed dynamic map.
        exp_avg_sq: (N,) uint8, codes of the unsigned one.
        exp_avg_scale: (⌈N / 256⌉,) float32, largest magnitude of each block.
        exp_avg_sq_scale: Like it.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq_scale: Tensor


class AdamWFactors(NamedTuple):
    """What a step multiplies by, in double precision; each is rounded to float32 once.

    Attributes:
        beta1: Decay of the average.
        average_share: 1 - beta1.
        beta2: Decay of the average of squares.
        square_share: 1 - beta2.
        decay: 1 - lr · weight_decay.
        step: -lr · √(1 - beta2ᵗ) / (1 - beta1ᵗ).
        eps: eps · √(1 - beta2ᵗ).
    """

    beta1: float
    average_share: float
    beta2: float
    square_share: float
    decay: float
    step: float
    eps: float

    @classmethod
    def of(
        cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, *, step: int
    ) -> AdamWFactors:
        """The factors of step number `step`, counted from 1.

        Source: Kingma and Ba, Adam (2015), the form at the end of section 2; Loshchilov and Hutter, Decoupled Weight
        Decay Regularization (2019), algorithm 2.
        """
        beta1, beta2 = betas
        root = math.sqrt(1.0 - beta2**step)
        step_size = -lr * root / (1.0 - beta1**step)
        return cls(beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 - lr * weight_decay, step_size, eps * root)


def adamw_8bit_(parameter: Tensor, gradient: Tensor, state: State8bit, factors: AdamWFactors) -> None:
    """One step of AdamW in place: the parameter moves by its averages before these are rounded to 8 bits.

    Args:
        parameter: (N,) float32, contiguous.
        gradient: (N,) float32, contiguous; every number finite, which the caller makes sure of.
        state: The averages, written anew.
        factors: Of this step.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit, or a tensor is not contiguous.

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.
    """
    count = parameter.numel()
    blocks = -(-count // STATE_BLOCK)
    wanted = {
        "parameter": (parameter, count, torch.float32),
        "gradient": (gradient, count, torch.float32),
        "exp_avg": (state.exp_avg, count, torch.uint8),
        "exp_avg_sq": (state.exp_avg_sq, count, torch.uint8),
        "exp_avg_scale": (state.exp_avg_scale, blocks, torch.float32),
        "exp_avg_sq_scale": (state.exp_avg_sq_scale, blocks, torch.float32),
    }
    for name, (tensor, size, dtype) in wanted.items():
        fits = tensor.shape == (size,) and tensor.dtype == dtype and tensor.device == parameter.device
        if not fits or not tensor.is_contiguous():
            raise refused("adamw_8bit", name, tensor, f"({size},) {dtype} on {parameter.device}, contiguous")
    torch.ops.halfbyte.adamw_8bit_(parameter, gradient, *state, list(factors))


define(
    "adamw_8bit_",
    "(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor(d!) m_scale, Tensor(e!) v_scale, float[] factors)"
    " -> ()",
    by_backend("adamw_8bit_"),
    lambda *_: None,
)
