"""A step of AdamW with 8-bit states in plain PyTorch.

It owns the meaning of the operation, the roundings included, and is written to be read; it must not be clever.

Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2; codes as bitsandbytes'
`quantize_blockwise` in plain PyTorch has them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from halfbyte.quant.codebook import dynamic_bounds, dynamic_map

BLOCK = 256


def adamw_8bit_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    factors: list[float],
) -> None:
    """Steps in place, every operation rounded to float32.

    With value(code) the map's value times the block's scale: m = β₁ m + m_share · g, v = β₂ v + (v_share · g) · g,
    p = decay · p + step · (m / (√v + eps)). The scale of a block is its largest magnitude, and the code of a number
    that of number · (1 / scale).

    Args:
        p: (N,) float32.
        g: (N,) float32.
        m: (N,) uint8 codes of the signed map.
        v: (N,) uint8 codes of the unsigned map.
        m_scale: (⌈N / 256⌉,) float32.
        v_scale: Like m_scale.
        factors: β₁, m_share, β₂, v_share, decay, step, eps.
    """
    beta1, m_share, beta2, v_share, decay, step, eps = factors
    average = _decode(m, m_scale, signed=True).mul_(beta1) + g * m_share
    squares = _decode(v, v_scale, signed=False).mul_(beta2) + (g * v_share) * g
    root = (
        squares.double().sqrt().float()
    )  # of float32 numbers torch does not round the root to nearest everywhere
    p.copy_(p * decay + (average / (root + eps)) * step)
    _encode(average, m, m_scale, signed=True)
    _encode(squares, v, v_scale, signed=False)


def _decode(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    values, _ = _tables(signed, codes.device)
    return values[codes.int()] * scale.repeat_interleave(BLOCK)[: codes.numel()]


def _encode(numbers: Tensor, codes: Tensor, scale: Tensor, *, signed: bool) -> None:
    _, bounds = _tables(signed, numbers.device)
    blocks = torch.nn.functional.pad(numbers, (0, -numbers.numel() % BLOCK)).view(-1, BLOCK)
    scale.copy_(blocks.abs().amax(dim=1))
    factor = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, 1.0 / scale)
    found = torch.bucketize(blocks * factor[:, None], bounds)
    codes.copy_(found.flatten()[: codes.numel()])


@cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A map's values and bounds."""
    made = dynamic_map(signed=signed), dynamic_bounds(signed=signed)
    values, bounds = (torch.from_numpy(table.copy()).to(device) for table in made)
    return values, bounds
