"""Spectra are those of the singular values; where they are sampled, they are near on shapes that differ much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.plan import spectra
from halfbyte.plan.spectra import LEADING, Spectrum, spectrum

# A sampled rank may be off by this share of all directions. Vectors of 10,000 numbers in all estimate a density to a
# standard error of sqrt(2 / 10,000), 1.4 %; 48 steps resolve it to about 1 / 48 of the range of values.
SAMPLED_WITHIN = 0.02
STABLE_WITHIN = 0.05
N, K = 1200, 1600


def by_numpy(matrix: Tensor) -> tuple[int, int, float]:
    """Ranks for 90 and 99 %, and the stable rank, from numpy's singular values."""
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    shares = np.cumsum(squares) / squares.sum()
    ranks = [int((shares < share).sum()) + 1 for share in (0.90, 0.99)]
    return ranks[0], ranks[1], float(squares.sum() / squares[0])


@pytest.mark.parametrize("shape", [(64, 172), (172, 64), (33, 33), (1, 5), (5, 1)])
def test_small_matrices_are_measured_exactly(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * torch.arange(1, shape[1] + 1)
    found = spectrum(matrix)
    rank_90, rank_99, stable = by_numpy(matrix)
    assert (found.rank, found.rank_90, found.rank_99) == (min(shape), rank_90, rank_99)
    assert found.stable_rank == pytest.approx(stable)
    assert found.method == "exact"


def test_a_matrix_of_zeros_has_no_rank() -> None:
    assert spectrum(torch.zeros(8, 9)) == Spectrum(8, 0, 0, 0.0, "exact")


def test_bfloat16_is_measured_as_its_values(tmp_path: object) -> None:
    matrix = torch.randn(40, 60, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert spectrum(matrix) == spectrum(matrix.double())


SHAPES = {
    "random": torch.ones(N),
    "slow decay": torch.arange(1, N + 1) ** -0.5,
    "fast decay": torch.exp(-torch.arange(N) / 100),
    "a few large": torch.cat((torch.full((20,), 50.0), torch.ones(N - 20))),
    "more large than are found singly": torch.cat(
        (torch.full((LEADING + 40,), 9.0), torch.ones(N - LEADING - 40))
    ),
    "low rank": torch.cat((torch.ones(30), torch.zeros(N - 30))),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("turned", [False, True], ids=["wide", "tall"])
def test_large_matrices_are_sampled_close_to_their_singular_values(name: str, turned: bool) -> None:
    random = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(N, N, generator=random)).Q
    matrix = (basis * SHAPES[name]) @ torch.randn(N, K, generator=random) / K**0.5
    found = spectrum(matrix.T.contiguous() if turned else matrix)
    rank_90, rank_99, stable = by_numpy(matrix)
    assert found.method.startswith("sampled")
    assert found.rank == N
    assert abs(found.rank_90 - rank_90) <= SAMPLED_WITHIN * N
    assert abs(found.rank_99 - rank_99) <= SAMPLED_WITHIN * N
    assert found.stable_rank == pytest.approx(stable, rel=STABLE_WITHIN)


def test_the_sampled_path_is_the_exact_one_on_a_real_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    matrix = torch.randn(500, 700, generator=random) @ torch.diag(torch.linspace(0.1, 1, 700))
    exact = spectrum(matrix)
    monkeypatch.setattr(spectra, "EXACT_UP_TO", 100)
    sampled = spectrum(matrix)
    assert exact.method != sampled.method
    assert abs(exact.rank_90 - sampled.rank_90) <= SAMPLED_WITHIN * 500
    assert abs(exact.rank_99 - sampled.rank_99) <= SAMPLED_WITHIN * 500
