"""Kept activations in 8 bits: blocks of a row with one scale each.

It owns the form, its rounding, its size, and which of a layer's tensors bear it; it must not know how a layer
computes, or when it is asked for.

A block of 64 neighbours of a row is a bfloat16 scale, absmax / 127, and a signed byte for each number, rounded to the
nearest. What enters an exponential in the backward pass (queries, keys, the log-sum-exp), what norms are computed
back with (their statistics) and what has no size (LoRA's inner activations) stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64
"""Neighbours of a row that share a scale."""

_PACKED = {"x", "v", "attended", "stream", "after_attention", "after_mlp", "q.raw", "k.raw", "up.0", "up.1"}
_CODES, _SCALES = ".codes", ".scales"
_CHUNK = 1 << 18  # numbers rounded at once, so that what lies between two passes over them stays in the cache


def packed_bytes(width: int) -> int:
    """Bytes of a row of `width` numbers."""
    return width + 2 * -(-width // BLOCK)


def pack(tensors: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """A layer's tensors with those in 8 bits that bear it.

    Args:
        tensors: By their names in `passes`, and the layer's input as `x`.
        tokens: M, the rows of each.

    Returns:
        Codes and scales in place of each that is in 8 bits; the others as they are.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _PACKED:
            packed[name + _CODES], packed[name + _SCALES] = quantise(tensor, tokens)
        else:
            packed[name] = tensor
    return packed


def unpack(packed: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `pack` was given, rounded.

    Args:
        packed: From `pack`.
        dtype: Of what is in 8 bits.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        if name.endswith(_CODES):
            own = name.removesuffix(_CODES)
            tensors[own] = dequantise(tensor, packed[own + _SCALES], dtype)
        elif not name.endswith(_SCALES):
            tensors[name] = tensor
    return tensors


def quantise(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows; what is not finite comes back as not finite.

    Args:
        x: Any shape of M · W numbers whose W of a row lie side by side.
        tokens: M.

    Returns:
        int8 of x's shape, and bfloat16 (M, ceil(W / 64)).
    """
    rows = x.reshape(tokens, -1)
    width, blocks = rows.shape[1], -(-rows.shape[1] // BLOCK)
    codes = torch.empty(x.shape, dtype=torch.int8)
    scales = torch.empty(tokens, blocks, dtype=torch.bfloat16)
    flat, step = codes.view(tokens, width), min(tokens, max(1, _CHUNK // width))
    room = torch.zeros(step, blocks * BLOCK)  # what fills up the last block stays zero
    positive = torch.empty_like(room)
    for begin in range(0, tokens, step):
        part = slice(begin, begin + step)
        padded = room[: min(step, tokens - begin)]
        padded[:, :width] = rows[part]
        numbers = padded.view(len(padded), blocks, BLOCK)
        largest = torch.abs(numbers, out=positive[: len(padded)].view_as(numbers)).amax(2)
        scales[part] = (largest / 127).clamp_min_(torch.finfo(torch.bfloat16).tiny)
        # A scale that bfloat16 rounded down gives at most 127 · (1 + 2^-8) = 127.496, which rounds to 127.
        flat[part] = numbers.div_(scales[part].float()[..., None]).round_().flatten(1)[:, :width]
    return codes, scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that codes and scales stand for, in the codes' shape."""
    x = codes.to(dtype)
    rows = x.view(len(scales), -1)
    whole = rows.shape[1] // BLOCK * BLOCK
    if whole:
        blocks = rows[:, :whole].as_strided((len(rows), whole // BLOCK, BLOCK), (rows.shape[1], BLOCK, 1))
        blocks.mul_(scales[:, : whole // BLOCK, None])
    rows[:, whole:].mul_(scales[:, whole // BLOCK :])
    return x
