"""One weight matrix: what 4 bits lose of it, and how many directions it needs.

It owns these measures and how large matrices are sampled for them; it must not know folders or rankings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.ops import dequantize_4bit, quantize_4bit
from halfbyte.plan.spectra import Spectrum, spectrum
from halfbyte.quant.weight import NESTED_BLOCKSIZE, QuantSpec

SAMPLE = 2**22
"""Weights of a matrix whose error is measured; of a larger one this many, evenly spread in runs."""
RUN = 2**14
BLOCK = QuantSpec().blocksize
NORMAL_ERROR = 0.0920
"""Relative error of NF4 with absmax scales, in 8 bits, for normally distributed weights; a test measures it."""
OUTLIER = 6.0
"""Weights farther from zero than this many root mean squares; of normal weights one in 500 million is."""


@dataclass(frozen=True)
class Matrix:
    """A weight of a linear layer as it was measured.

    Attributes:
        name: Its name in the file.
        shape: (N, K).
        energy: Sum of its squared weights, from the share that was read for the error.
        error_absmax: Root mean square of what NF4 with absmax scales changes, by that of the weights; None where it
            is in 4 bits already.
        error_mse: The same with scales of least squared error.
        outliers: Share of weights far out.
        share: Of its weights, those measured for the three numbers above.
        spectrum: Its singular values; None where they were not asked for.
    """

    name: str
    shape: tuple[int, int]
    energy: float
    error_absmax: float | None
    error_mse: float | None
    outliers: float
    share: float
    spectrum: Spectrum | None

    @property
    def parameters(self) -> int:
        """Its weights."""
        return self.shape[0] * self.shape[1]


def measure_matrix(name: str, weight: Tensor, *, in_4bit: bool = False, spectra: bool = True) -> Matrix:
    """Measure a matrix.

    Args:
        name: Its name.
        weight: (N, K) floating point, finite.
        in_4bit: It came from 4 bits: what they lost is gone.
        spectra: Measure the singular values too, which takes most of the time.
    """
    sample = _sample(weight)
    mean_square = float((sample.double() ** 2).mean())
    errors: list[float | None] = [None, None]
    if not in_4bit and mean_square > 0:
        errors = [
            _relative_error(sample, mean_square, QuantSpec(scales="absmax")),
            _relative_error(sample, mean_square, QuantSpec(scales="mse")),
        ]
    far = sample.abs() > OUTLIER * mean_square**0.5
    return Matrix(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        energy=mean_square * weight.numel(),
        error_absmax=errors[0],
        error_mse=errors[1],
        outliers=float(far.double().mean()) if mean_square > 0 else 0.0,
        share=sample.numel() / weight.numel(),
        spectrum=spectrum(weight) if spectra else None,
    )


def bytes_in_4bit(shape: tuple[int, int], spec: QuantSpec | None = None) -> int:
    """Bytes of a matrix in 4 bits, with its scales and codebooks: what `Weight4bit.nbytes` will be.

    Args:
        shape: (N, K).
        spec: The format; NF4 with double quantization if None.
    """
    spec = spec or QuantSpec()
    weights = shape[0] * shape[1]
    scales = -(-weights // spec.blocksize)
    codes_and_codebook = (weights + 1) // 2 + 16 * 4
    if not spec.double_quant:
        return codes_and_codebook + 4 * scales
    return codes_and_codebook + scales + 4 * -(-scales // NESTED_BLOCKSIZE) + 256 * 4 + 4


def _sample(weight: Tensor) -> Tensor:
    """All weights as they stand, or evenly spread runs of them, each beginning where a block of scales does."""
    if weight.numel() <= SAMPLE:
        return weight.to(torch.float32)
    flat, runs = weight.reshape(-1), SAMPLE // RUN
    starts = [i * (flat.numel() - RUN) // (runs - 1) // BLOCK * BLOCK for i in range(runs)]
    return torch.stack([flat[start : start + RUN] for start in starts]).to(torch.float32)


def _relative_error(weights: Tensor, mean_square: float, spec: QuantSpec) -> float:
    lost = dequantize_4bit(quantize_4bit(weights, spec), torch.float32) - weights
    return math.sqrt(float((lost.double() ** 2).mean()) / mean_square)
