"""4-bit weights in plain PyTorch: encoding and decoding.

It owns the meaning of these operations and is written to be read; it must not be clever.

Shapes: N out features, K in features, G blocks, M rows of activations. `parts` are a quantised weight's tensors
in the order of `WeightParts`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.quant.codebook import thresholds
from halfbyte.quant.search import FIRST_FRACTION, LAST_FRACTION, REFINEMENTS, TRIALS
from halfbyte.quant.weight import WeightParts, decode_scales

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def block_scales(weight: Tensor, blocksize: int) -> Tensor:
    """The largest magnitude of each block of consecutive elements; NaN or infinity where the block has one.

    Args:
        weight: (N, K) float32, bfloat16 or float16.
        blocksize: Elements per block; the last block may be shorter.

    Returns:
        (G,) float32.
    """
    return _blocks(weight, blocksize).abs().amax(dim=1)


def search_scales(weight: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    """The scale of each block with the least squared error found.

    Tries evenly spaced fractions of the block's largest magnitude, then moves the best one to the least-squares
    scale of its own codes a few times. A block of zeros, and one with NaN or infinity, keeps its largest magnitude.

    Args:
        weight: (N, K) float32, bfloat16 or float16.
        codebook: (16,) float32.
        blocksize: Elements per block.

    Returns:
        (G,) float32.
    """
    blocks = _blocks(weight, blocksize)
    largest = blocks.abs().amax(dim=1)

    def error_and_fit(scale: Tensor) -> tuple[Tensor, Tensor]:
        value = codebook[_nearest(blocks * _inverse(scale)[:, None], codebook).long()]
        error = (blocks - value * scale[:, None]).square().sum(dim=1)
        norm = value.square().sum(dim=1)
        return error, torch.where(norm > 0, (blocks * value).sum(dim=1) / norm, scale)

    best = largest.clone()
    least, fit = error_and_fit(best)
    for trial in range(TRIALS):
        fraction = FIRST_FRACTION + (LAST_FRACTION - FIRST_FRACTION) * trial / (TRIALS - 1)
        scale = largest * fraction
        error, its_fit = error_and_fit(scale)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
        fit = torch.where(better, its_fit, fit)
    for _ in range(REFINEMENTS):
        error, its_fit = error_and_fit(fit)
        better = error < least
        best, least = torch.where(better, fit, best), torch.where(better, error, least)
        fit = torch.where(better, its_fit, fit)
    return best


def encode_4bit(weight: Tensor, scales: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    """The codes of the nearest codebook values, two to a byte, the first in the high nibble.

    Each element is multiplied by the float32 inverse of its block's scale (0 for a scale below the smallest normal
    number, so that such a block becomes zeros) and takes the codebook entry that it lies nearest to, the lower
    one if halfway. An odd last nibble holds the code of zero.

    Args:
        weight: (N, K) float32, bfloat16 or float16.
        scales: (G,) float32.
        codebook: (16,) float32.
        blocksize: Elements per scale.

    Returns:
        (ceil(N·K / 2),) uint8.
    """
    blocks = _blocks(weight, blocksize)
    count = weight.numel()
    codes = _nearest(blocks * _inverse(scales)[:, None], codebook).reshape(-1)[: count + count % 2]
    if codes.numel() < count + count % 2:
        codes = F.pad(codes, (0, 1))
    if count % 2:
        codes[-1] = _nearest(torch.zeros(1), codebook)
    return codes[0::2] << 4 | codes[1::2]


def dequantize_4bit(parts: WeightParts, dtype: torch.dtype) -> Tensor:
    """The matrix that the codes stand for: codebook value times scale in float32, rounded once to `dtype`.

    Returns:
        (N, K) in `dtype`.
    """
    nibbles = torch.stack([parts.codes >> 4, parts.codes & 15], dim=1).reshape(-1)[: parts.N * parts.K]
    scale = decode_scales(parts).repeat_interleave(parts.blocksize)[: parts.N * parts.K]
    return (parts.codebook[nibbles.long()] * scale).to(dtype).reshape(parts.N, parts.K)


def _blocks(weight: Tensor, blocksize: int) -> Tensor:
    """(G, blocksize) float32, the last block filled up with zeros."""
    flat = weight.detach().reshape(-1).to(torch.float32)
    return F.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize)


def _inverse(scales: Tensor) -> Tensor:
    usable = scales >= SMALLEST_NORMAL
    return torch.where(usable, 1 / scales.where(usable, torch.ones_like(scales)), torch.zeros_like(scales))


def _nearest(normalised: Tensor, codebook: Tensor) -> Tensor:
    bounds, order = (torch.from_numpy(array.copy()) for array in thresholds(codebook.numpy()))
    return order[torch.bucketize(normalised, bounds)]
