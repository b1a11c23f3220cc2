"""What a training loop asks of its examples: how many, how long, which one, and a digest of them all.

It owns that question and its answer for examples held in a list; it must not know what an example is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray


class Learnable(Protocol):
    """One thing to learn from, ready for a model."""

    @property
    def id(self) -> str:
        """Content hash of the row."""

    @property
    def where(self) -> str:
        """`file:line` of the row."""

    @property
    def tokens(self) -> int:
        """Positions it takes in a model."""

    @property
    def content(self) -> bytes:
        """All that is learnt from it, for a digest."""


L_co = TypeVar("L_co", bound=Learnable, covariant=True)


class ExampleSet(Protocol[L_co]):
    """Examples in a fixed order, in memory or in a file."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[L_co]: ...

    def __getitem__(self, at: int, /) -> L_co: ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each, (n,)."""

    @property
    def sha256(self) -> str:
        """Digest of all that is learnt from them, in order."""


class Listed(Sequence[L_co]):
    """Examples held in memory.

    Args:
        examples: In their order.
    """

    def __init__(self, examples: Sequence[L_co]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, at: int) -> L_co: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[L_co]: ...

    def __getitem__(self, at: int | slice) -> L_co | Sequence[L_co]:
        return self._examples[at]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each, (n,)."""
        return np.array([example.tokens for example in self._examples], np.int64)

    @cached_property
    def sha256(self) -> str:
        """Digest of all that is learnt from them, in order."""
        digest = hashlib.sha256()
        for example in self._examples:
            content = example.content
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        return digest.hexdigest()
