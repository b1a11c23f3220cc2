"""Examples to the arrays a model is given: packed end to end in one row, or side by side with padding.

It owns where each document lies in a batch and what it is asked to predict; it must not know text, templates or
which examples come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.tokenise import Example

UNTRAINED = -100  # the label transformers and torch's cross-entropy leave out


@dataclass(frozen=True)
class Batch:
    """Documents in an array of tokens: all in one row, or one in each row and filled up at the right.

    Attributes:
        input_ids: Token ids, int64, (B, T).
        labels: The same ids where a token is a target, else -100, int64, (B, T); not shifted. A document's first
            token is never one: nothing of its own precedes it, and what does must not predict it.
        documents: Where each document lies, int32, (n, 3): row, first token, token after the last.
        ids: Content hashes of the documents, (n,).
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: NDArray[np.int32]
    ids: tuple[str, ...]

    @property
    def is_packed(self) -> bool:
        """Whether a row holds several documents; then there is one row, without padding."""
        return len(self.documents) > len(self.input_ids)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, int32, (n,)."""
        return self.documents[:, 2] - self.documents[:, 1]

    @property
    def tokens(self) -> int:
        """Tokens, without padding."""
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Targets."""
        return int((self.labels != UNTRAINED).sum())

    @property
    def attention_mask(self) -> NDArray[np.int64]:
        """1 for tokens, 0 for padding, int64, (B, T)."""
        mask = np.zeros_like(self.input_ids)
        for row, begin, end in self.documents:
            mask[row, begin:end] = 1
        return mask

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """Position of each token in its own document, from 0, int64, (B, T); 0 on padding."""
        positions = np.zeros_like(self.input_ids)
        for row, begin, end in self.documents:
            positions[row, begin:end] = np.arange(end - begin)
        return positions

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Where the documents of the one row begin, and its end, int32, (n + 1,)."""
        assert len(self.input_ids) == 1, "only documents of one row lie end to end"
        return np.append(self.documents[:, 1], self.documents[-1:, 2])

    def only(self, first: int, every: int) -> Batch:
        """The batch of some of its documents, laid out as this one is.

        Args:
            first: Number of the first of them.
            every: Distance from one to the next.
        """
        documents = self.documents[first::every]
        ids = self.ids[first::every]
        if not self.is_packed:
            rows = np.arange(len(documents), dtype=np.int32)
            placed = np.concatenate([rows[:, None], documents[:, 1:]], axis=1)
            return Batch(self.input_ids[documents[:, 0]], self.labels[documents[:, 0]], placed, ids)
        kept = np.concatenate([np.arange(begin, end) for _, begin, end in documents])
        ends = np.cumsum(documents[:, 2] - documents[:, 1], dtype=np.int32)
        placed = np.stack([np.zeros_like(ends), np.append(np.int32(0), ends[:-1]), ends], axis=1)
        return Batch(self.input_ids[:, kept], self.labels[:, kept], placed, ids)


def pack(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row, in the order given; nothing is padded.

    Args:
        examples: At least one.

    Returns:
        A batch of shape (1, T).
    """
    ends = np.cumsum([len(e.input_ids) for e in examples], dtype=np.int32)
    begins = np.append(np.int32(0), ends[:-1])
    return Batch(
        np.concatenate([e.input_ids for e in examples], dtype=np.int64)[None],
        np.concatenate([_labels(e) for e in examples])[None],
        np.stack([np.zeros_like(ends), begins, ends], axis=1),
        tuple(e.id for e in examples),
    )


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Lay examples side by side, in the order given, filled up at the right to the longest.

    Args:
        examples: At least one.
        pad_id: Id to fill with; it is masked and never a target.

    Returns:
        A batch of shape (B, T).
    """
    lengths = np.array([len(e.input_ids) for e in examples], np.int32)
    shape = len(examples), int(lengths.max())  # (B, T)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, UNTRAINED, np.int64)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.input_ids
        labels[row, : lengths[row]] = _labels(example)
    rows = np.arange(len(examples), dtype=np.int32)
    documents = np.stack([rows, np.zeros_like(rows), lengths], axis=1)
    return Batch(input_ids, labels, documents, tuple(e.id for e in examples))


def _labels(example: Example) -> NDArray[np.int64]:
    """An example's targets, int64, (T,)."""
    labels = np.where(example.trained, example.input_ids, UNTRAINED).astype(np.int64)
    labels[0] = UNTRAINED
    return labels
