"""The 16 values of NF4 and FP4 and the 256 values of the dynamic 8-bit map, built from their definitions.

It owns these numbers and the thresholds between them; it must not know tensors, blocks or files.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

Format = Literal["nf4", "fp4"]
FORMATS: tuple[Format, ...] = get_args(Format)

_T = TypeVar("_T", bound=np.generic)

# The quantile at which NF4 begins: the mean of 1 - 1/(2·15) and 1 - 1/(2·16), rounded as its authors wrote it.
NF4_OFFSET = 0.9677083

# FP4's three magnitude bits 000 … 111: one subnormal, then the E2M1 numbers, in units of 1/12.
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _linspace_f32(start: float, stop: float, count: int) -> NDArray[np.float32]:
    """Evenly spaced float32 numbers, counted from both ends with one rounding each, as the published maps were."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64(np.float32((last - first) / np.float32(count - 1)))
    i = np.arange(count)
    ahead, behind = np.float64(first) + step * i, np.float64(last) - step * (count - 1 - i)
    return np.where(i < count // 2, ahead, behind).astype(np.float32)


@cache
def nf4_codebook() -> NDArray[np.float32]:
    """The 16 NormalFloat-4 values, ascending, from -1 to 1 with an exact zero.

    Eight positive and seven negative quantiles of the normal distribution and zero, divided by the largest.

    Returns:
        (16,) float32, read-only.

    Source: QLoRA (arXiv 2305.14314), section 3, in float32 as bitsandbytes builds them.
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in _linspace_f32(NF4_OFFSET, 0.5, 9)[:-1]]
    negative = [-quantile(float(p)) for p in _linspace_f32(NF4_OFFSET, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative], dtype=np.float32))
    return _frozen(values / values.max())


@cache
def fp4_codebook() -> NDArray[np.float32]:
    """The 16 FP4 values in the order of their codes: sign bit, two exponent bits, one mantissa bit.

    Returns:
        (16,) float32, read-only; entry 8 is minus zero.

    Source: bitsandbytes' FP4 data type (`fp4`), whose magnitudes are normalised to 1.
    """
    magnitude = np.array(FP4_TWELFTHS, dtype=np.float32) / np.float32(12.0)
    return _frozen(np.concatenate([magnitude, -magnitude]))


def codebook(fmt: Format) -> NDArray[np.float32]:
    """The (16,) float32 codebook of a format, in the order of its codes."""
    return CODEBOOKS[fmt]()


CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook}


def thresholds(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Where one code ends and the next begins, for a codebook in any order.

    A value belongs to the entry whose number in ascending order is the count of thresholds below it, so a
    value halfway between two entries takes the lower one. Equal entries (FP4's two zeros) count once: the
    later code is never produced.

    Args:
        values: (16,) float32 codebook in the order of its codes.

    Returns:
        (15,) float32 ascending thresholds, padded with +inf, and (16,) uint8 codes in ascending order of value.
    """
    distinct, first = np.unique(values, return_index=True)
    between = ((distinct[1:].astype(np.float64) + distinct[:-1].astype(np.float64)) / 2).astype(np.float32)
    bounds = np.full(15, np.inf, dtype=np.float32)
    bounds[: between.size] = between
    order = np.zeros(16, dtype=np.uint8)
    order[: first.size] = first
    return _frozen(bounds), _frozen(order)


@cache
def dynamic_map(*, signed: bool = True) -> NDArray[np.float32]:
    """The dynamic 8-bit map: the signed one, in which scales are themselves stored, or the unsigned one.

    Seven decades; decade i holds 2^i values per sign, or twice as many without sign, at the centres of equal parts of
    [0.1, 1], scaled by 10^(i-6); then 0 and 1.

    Args:
        signed: Whether it has negative values.

    Returns:
        (256,) float32, ascending from -0.99297, or from 0, to 1, read-only.

    Source: 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), section 2.1, in float32 as
    bitsandbytes builds it.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _linspace_f32(0.1, 1.0, 2 ** (decade if signed else decade + 1) + 1)
        centres = ((edges[:-1] + edges[1:]) / np.float32(2.0)).astype(np.float32)
        scaled = np.float32(10.0 ** (decade - 6)) * centres
        values += [*scaled.tolist(), *(-scaled if signed else scaled[:0]).tolist()]
    return _frozen(np.sort(np.array(values, dtype=np.float32)))


@cache
def dynamic_bounds(*, signed: bool = True) -> NDArray[np.float32]:
    """Where one code of a dynamic map ends and the next begins: a number's code is the count of bounds below it.

    Args:
        signed: Of which map.

    Returns:
        (255,) float32, ascending, read-only.

    Source: bitsandbytes' `quantize_blockwise` in plain PyTorch, whose middles are rounded to float32 as here.
    """
    values = dynamic_map(signed=signed)
    return _frozen(((values[:-1] + values[1:]) / np.float32(2.0)).astype(np.float32))


def _frozen(array: NDArray[_T]) -> NDArray[_T]:
    array.setflags(write=False)
    return array
