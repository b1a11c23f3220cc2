"""Examples to batches: in what order, how padded, and how many trained tokens each one counts.

It owns the order of rows within an epoch and the arrays a model is given; it must not know text or templates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.tokenise import Example

UNTRAINED = -100  # the label transformers and torch's cross-entropy leave out
WINDOW_BATCHES = (
    32  # batches sorted by length together: enough for little padding, few enough to stay shuffled
)


@dataclass(frozen=True)
class Batch:
    """Examples side by side, filled up at the right to the longest.

    Attributes:
        input_ids: Token ids, int64, (B, T).
        labels: The same ids where a token is a target, else -100, int64, (B, T); not shifted.
        attention_mask: 1 for tokens, 0 for filling, int64, (B, T).
        trained_tokens: Targets at positions from 1 on: those that count once labels are shifted.
        ids: Content hashes of the rows.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    trained_tokens: int
    ids: tuple[str, ...]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Put examples into one batch, in the order given.

    Args:
        examples: At least one.
        pad_id: Id to fill with; it is masked and never a target.
    """
    shape = len(examples), max(len(e.input_ids) for e in examples)  # (B, T)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, UNTRAINED, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        labels[row, :length] = np.where(example.trained, example.input_ids, UNTRAINED)
        attention_mask[row, :length] = 1
    trained_tokens = sum(e.trained_tokens for e in examples)
    return Batch(input_ids, labels, attention_mask, trained_tokens, tuple(e.id for e in examples))


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Which examples make up each batch of an epoch.

    Examples are shuffled, sorted by length within windows of 32 batches, cut into batches, and the batches
    are shuffled. Each example comes once; at most one batch is short. The arguments alone decide the order.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per batch.
        seed: Not negative.
        epoch: From 0.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    size = np.asarray(lengths)[shuffled]
    window = batch_size * WINDOW_BATCHES
    order = np.concatenate(
        [shuffled[:0]]
        + [
            shuffled[start : start + window][np.argsort(size[start : start + window], kind="stable")]
            for start in range(0, len(lengths), window)
        ]
    ).tolist()
    found = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [found[i] for i in random.permutation(len(found))]


def batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, pad_id: int
) -> Iterator[Batch]:
    """The batches of an epoch, made one at a time; see `batch_order` for their order."""
    for indices in batch_order([len(e.input_ids) for e in examples], batch_size, seed, epoch):
        yield collate([examples[i] for i in indices], pad_id)


def steps_per_epoch(examples: int, batch_size: int, gradient_accumulation_steps: int = 1) -> int:
    """Optimizer steps of one epoch; the last one may be short."""
    return math.ceil(math.ceil(examples / batch_size) / gradient_accumulation_steps)
