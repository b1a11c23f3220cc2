"""What a product is made of: activations, weights in 4 bits or dense, bias, residual.

It owns these types, which `kernels.linear` hands to the backends; it must not know how anything is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from halfbyte.quant.weight import WeightParts

Factor = Tensor | WeightParts
"""A weight (N, K): in 4 bits, or a dense tensor of the activations' dtype whose rows are contiguous."""


class Term(NamedTuple):
    """Activations times a weight.

    Attributes:
        a: (M, K) or, for a gradient, (M, N); rows contiguous, any distance apart.
        factor: (N, K).
    """

    a: Tensor
    factor: Factor


class Product(NamedTuple):
    """A sum of terms, rounded once.

    Attributes:
        terms: At least one, with one M and one N (for a gradient: one M and one K).
        bias: (N,) or None.
        residual: Shaped as the result, contiguous, or None.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """The (N, K) of its first factor."""
        return sizes(self.terms[0].factor)


def sizes(factor: Factor) -> tuple[int, int]:
    """The (N, K) of a factor."""
    return (factor.shape[0], factor.shape[1]) if isinstance(factor, Tensor) else (factor.N, factor.K)
