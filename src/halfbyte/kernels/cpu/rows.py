"""Tensors as the compiled module sees them: rows in at most three strided dimensions.

It owns finding that form, and copying what has none; it must not know any operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES

Extent = tuple[int, int, int, int]  # rows in three dimensions, numbers of a row
Rows = tuple[int, int, int, int, int]  # address, dtype, stride of each of the three dimensions in elements

ABSENT: Rows = (0, 0, 0, 0, 0)


def fresh(x: Tensor) -> Tensor:
    """A contiguous tensor like x, its numbers unset."""
    # The second is right for both but takes twice as long, which counts where one token is decoded at a time.
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def layout(*tensors: Tensor | None, flat: bool = False) -> tuple[Extent, list[Rows]] | None:
    """The common form of tensors of one shape (..., D).

    Args:
        tensors: The tensors, the first not None; None becomes an absent operand.
        flat: Whether rows may be joined where all tensors are contiguous: right for what is done number by number.

    Returns:
        The extent and each tensor's rows, or None where three dimensions do not do or a row's numbers are not
        neighbours.
    """
    first = tensors[0]
    assert first is not None
    count = first.numel()
    cols = count if flat else first.shape[-1]
    rows: list[Rows] = []
    for tensor in tensors:
        if tensor is None:
            rows.append(ABSENT)
        elif tensor.is_contiguous():
            rows.append((tensor.data_ptr(), DTYPES[tensor.dtype], 0, 0, cols))
        else:
            return _strided_layout(first.shape, tensors)
    return (1, 1, count // max(cols, 1), cols), rows


def readable(
    *tensors: Tensor | None, flat: bool = False
) -> tuple[Extent, list[Rows], tuple[Tensor | None, ...]]:
    """`layout` of tensors that are only read: copied where there is no other way.

    Returns:
        The extent, each tensor's rows, and the tensors that own the memory, to be held until it has been used.
    """
    found = layout(*tensors, flat=flat)
    if found is None:
        tensors = tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
        found = layout(*tensors, flat=flat)
        assert found is not None, "contiguous tensors always have a form"
    return *found, tensors


def _strided_layout(
    shape: torch.Size, tensors: tuple[Tensor | None, ...]
) -> tuple[Extent, list[Rows]] | None:
    strides = [None if tensor is None else tensor.stride() for tensor in tensors]
    if shape[-1] > 1 and any(stride is not None and stride[-1] != 1 for stride in strides):
        return None
    sizes, kept = _joined(shape[:-1], [stride for stride in strides if stride is not None])
    if len(sizes) > 3:
        return None
    missing = 3 - len(sizes)
    outer, middle, inner = [1] * missing + sizes
    found = iter(kept)
    rows = []
    for tensor in tensors:
        if tensor is None:
            rows.append(ABSENT)
        else:
            a, b, c = [0] * missing + next(found)
            rows.append((tensor.data_ptr(), DTYPES[tensor.dtype], a, b, c))
    return (outer, middle, inner, shape[-1]), rows


def _joined(sizes: Sequence[int], strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Dimensions joined where every tensor walks through them in one stride: their sizes, and strides per tensor."""
    joined: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    if math.prod(sizes) == 0:
        return [0], [[0] for _ in strides]
    for i, size in enumerate(sizes):
        if size == 1:
            continue
        if joined and all(mine[-1] == size * stride[i] for mine, stride in zip(kept, strides, strict=True)):
            joined[-1] *= size
            for mine, stride in zip(kept, strides, strict=True):
                mine[-1] = stride[i]
            continue
        joined.append(size)
        for mine, stride in zip(kept, strides, strict=True):
            mine.append(stride[i])
    return joined, kept
