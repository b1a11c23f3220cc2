"""What the tests of element-wise and row-wise operations share: rows of random numbers, and the comparison with a
result that is exact to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

# One rounding of a float32 operation, relative.
UNIT = 2.0**-24
# Operations on numbers below the smallest normal one round to multiples of 2^-149 instead; a handful of them.
TINY = 8 * 2.0**-149


def rounded_interval(
    exact: torch.Tensor, error: torch.Tensor | float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `exact`, known to within `error`, can become when it is rounded to `dtype`: rounding is monotonic."""
    error = error + TINY
    return (exact - error).to(dtype), (exact + error).to(dtype)


def within(got: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Fails unless low <= got <= high; NaN is nowhere."""
    assert got.dtype == low.dtype
    assert got.shape == low.shape
    outside = ~((low <= got) & (got <= high))
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        where = f"{int(outside.sum())} of {got.numel()} outside, first at {at}"
        raise AssertionError(f"{where}: {got[at].item()} is not in {low[at].item()} … {high[at].item()}")


@pytest.fixture
def assert_rounded() -> Callable[..., None]:
    """Asserts that a result is what `exact` (float64) may become in its dtype when `error` was made before."""

    def check(got: torch.Tensor, exact: torch.Tensor, error: torch.Tensor | float) -> None:
        within(got, *rounded_interval(exact, error, got.dtype))

    return check


@pytest.fixture
def assert_product_of_rounded() -> Callable[..., None]:
    """Asserts that a result is round(round(exact) · factor), `exact` known to within `error` before its rounding."""

    def check(
        got: torch.Tensor,
        exact: torch.Tensor,
        error: torch.Tensor | float,
        factor: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        low, high = (bound.float() for bound in rounded_interval(exact, error, dtype))
        wide = factor.float()  # a product of two bf16 or two f16 numbers is exact in float32
        products = torch.stack([low * wide, high * wide]).to(got.dtype)
        within(got, products.amin(0), products.amax(0))

    return check


@pytest.fixture
def numbers() -> Callable[..., torch.Tensor]:
    """Normal random numbers of a shape and dtype by seed."""

    def make(
        *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
    ) -> torch.Tensor:
        return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)

    return make
