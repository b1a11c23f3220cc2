"""How much of a matrix lies in few directions: ranks that hold a share of its energy, and its stable rank.

It owns the two methods, the exact and the sampled; it must not know models or files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_UP_TO = 1024
"""Smaller side up to which all singular values are computed; more would take the cube of it in time."""
LEADING = 32
STEPS = 48
REFINING_STEPS = 16
PROBED = 10_000
"""Random vectors times their length: the density's error depends on this product alone."""
SHARES = (0.90, 0.99)


class Spectrum(NamedTuple):
    """The singular values of a matrix, in a few numbers.

    Attributes:
        rank: The most directions it could have: its smaller side.
        rank_90: Directions that hold 90 % of the sum of squared singular values.
        rank_99: As many for 99 %.
        stable_rank: The sum of squares by the largest square.
        method: `exact`, or how it was sampled.
    """

    rank: int
    rank_90: int
    rank_99: int
    stable_rank: float
    method: str


def spectrum(matrix: Tensor, seed: int = 0) -> Spectrum:
    """Measure a matrix.

    Up to a smaller side of 1,024 all eigenvalues of its Gram matrix are computed. Beyond that the 32 leading
    directions are found by subspace iteration, and the density of the others by Lanczos steps from random vectors
    that are free of them.

    Args:
        matrix: (N, K) floating point, finite.
        seed: Of the random vectors.

    Source: stochastic Lanczos quadrature, Ubaru, Chen, Saad (2017), with the deflation of Meyer et al., Hutch++
        (arXiv 2010.09649).
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    n = wide.shape[0]
    if n <= EXACT_UP_TO:
        wide = wide.to(torch.float64)
        squares = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).flip(0)
        return _summed(squares, torch.ones_like(squares), n, "exact")
    probes = -(-PROBED // n)
    squares, counts = _sampled(wide.to(torch.float32), probes, torch.Generator().manual_seed(seed))
    method = f"sampled: {LEADING} leading directions, the others by {probes} random vectors of {STEPS} steps"
    return _summed(squares, counts, n, method)


def _summed(squares: Tensor, counts: Tensor, n: int, method: str) -> Spectrum:
    """The numbers of a spectrum given as squared values, largest first, and how often each occurs."""
    energy = torch.cumsum(squares * counts, 0)
    if not energy[-1] > 0:
        return Spectrum(n, 0, 0, 0.0, method)
    directions = torch.cumsum(counts, 0)
    ranks = []
    for share in SHARES:
        at = int(torch.searchsorted(energy, share * energy[-1]).clamp(max=len(energy) - 1))
        before = float(energy[at - 1]) if at else 0.0
        part = (share * float(energy[-1]) - before) / max(float(energy[at]) - before, 1e-300)
        ranks.append(float(directions[at - 1]) * (at > 0) + part * float(counts[at]))
    rank_90, rank_99 = (min(n, -int(-rank // 1)) for rank in ranks)
    return Spectrum(n, rank_90, rank_99, float(energy[-1] / squares[0]), method)


def _sampled(wide: Tensor, probes: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squared singular values with the number of directions that each stands for, largest first."""
    n = wide.shape[0]
    basis = torch.randn(n, LEADING + 8, generator=random)
    for _ in range(4):
        basis = torch.linalg.qr(_gram_times(wide, basis)).Q
    values, turned = torch.linalg.eigh((basis.T @ _gram_times(wide, basis)).to(torch.float64))
    leading = values.flip(0)[:LEADING].clamp(min=0)
    known = (basis @ turned.flip(1)[:, :LEADING].to(torch.float32)).contiguous()
    nodes, weights = [], []
    starts = torch.randn(n, probes, generator=random)
    for squares, vectors in _lanczos(wide, starts, STEPS, known):
        nodes.append(squares.clamp(min=0))
        weights.append(vectors[0] ** 2 * (n - LEADING) / probes)
    rest, counts = torch.cat(nodes), torch.cat(weights)
    # Of values that lie close together subspace iteration finds less than the largest.
    ((refined, _),) = _lanczos(wide, known[:, :1], REFINING_STEPS, known[:, :0])
    leading[0] = refined[-1]
    # The rest's energy is known exactly; only how it is spread is sampled.
    energy = float((wide.to(torch.float64) ** 2).sum() if wide.numel() < 2**22 else wide.norm() ** 2)
    rest = rest * max(energy - float(leading.sum()), 0.0) / max(float((rest * counts).sum()), 1e-300)
    rest = rest.clamp(max=float(leading[-1]))
    order = torch.argsort(rest, descending=True)
    return torch.cat((leading, rest[order])), torch.cat(
        (torch.ones(LEADING, dtype=torch.float64), counts[order])
    )


def _gram_times(wide: Tensor, v: Tensor) -> Tensor:
    """W · Wᵀ · v, in the order of operands that BLAS is quick with for a few columns."""
    return wide @ (v.T @ wide).T


def _lanczos(wide: Tensor, starts: Tensor, steps: int, known: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ritz values of the Gram matrix, least first, and vectors, from each of `starts` less its known directions."""

    def outside(v: Tensor) -> Tensor:
        return v - known @ (known.T @ v)

    v = outside(starts)
    v = v / v.norm(dim=0)
    history, alphas, betas = [v], [], []
    while True:
        w = outside(_gram_times(wide, v))
        alphas.append((w * v).sum(dim=0))
        if len(alphas) == steps:
            break
        for _ in range(2):  # once leaves what rounding brought back
            for old in history:
                w = w - old * (w * old).sum(dim=0)
        betas.append(w.norm(dim=0))
        v = w / betas[-1].clamp(min=1e-30)
        history.append(v)
    a, b = torch.stack(alphas).to(torch.float64), torch.stack(betas).to(torch.float64)
    triangles = [torch.diag(x) + torch.diag(y, 1) + torch.diag(y, -1) for x, y in zip(a.T, b.T, strict=True)]
    return [tuple(torch.linalg.eigh(triangle)) for triangle in triangles]
