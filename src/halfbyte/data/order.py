"""Which examples make up each forward and backward pass, epoch after epoch, and where a run stands in that order.

It owns the shuffling, the choice of examples that fill a pass, and the position a run continues from; of the
examples it must not know more than their length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import ConfigError, DataError

if TYPE_CHECKING:
    from halfbyte.settings import TrainConfig

Pass = list[int]
"""Indices of the examples of one forward and backward pass."""

PADDED_WINDOW = 32
"""Batches of rows sorted by length together: enough for little padding, few enough to stay shuffled."""

PACKED_WINDOW = 64
"""Passes packed together. Each window leaves about one pass part-filled, so on Alpaca's lengths passes are 98.3 to
98.7 % full for budgets of 512 to 4,096 tokens (`bench/packing.py`), and 97.2 to 97.7 % in windows of 32. Larger
windows add less than 1 % and let length decide ever more which rows meet: one for all rows would bring nearly
the same ones together in every epoch."""


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: which pass comes next.

    Args:
        epoch: From 0.
        window: Window of that epoch.
        index: Pass of that window; one beyond the last means the window's end.
    """

    epoch: int = 0
    window: int = 0
    index: int = 0


class Order(Protocol):
    """The passes of a run. Its own fields alone decide them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, (n,)."""

    @property
    def most_tokens(self) -> int:
        """Most tokens of a pass, padding included."""

    @property
    def largest(self) -> Pass:
        """The pass that needs most memory of all there could be."""

    def windows(self, epoch: int, first: int = 0) -> Iterator[list[Pass]]:
        """The passes of an epoch, window by window; those before `first` are not worked out."""

    def room(self, members: Pass) -> int:
        """Tokens that a pass could hold at no more cost."""


@dataclass(frozen=True, eq=False)
class Padded:
    """A fixed number of rows per pass, of similar length, so that little is padded.

    Rows are shuffled, sorted by length within windows of 32 batches, cut into batches, and the batches are
    shuffled. Each row comes once an epoch; at most one batch is short.

    Args:
        lengths: Tokens of each row, (n,).
        batch_size: Rows per pass.
        seed: Not negative.
    """

    lengths: NDArray[np.int64]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        _refuse_nothing(self.lengths)

    @property
    def most_tokens(self) -> int:
        """A batch of the longest rows."""
        return min(self.batch_size, len(self.lengths)) * int(self.lengths.max())

    @property
    def largest(self) -> Pass:
        """A batch of the longest rows."""
        return longest_first(self.lengths)[: self.batch_size]

    def windows(self, epoch: int, first: int = 0) -> Iterator[list[Pass]]:
        """The whole epoch as one window: cutting costs nothing, so nothing is gained by starting later."""
        if first > 0:
            return
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.lengths))
        window = self.batch_size * PADDED_WINDOW
        order: list[int] = []
        for begin in range(0, len(shuffled), window):
            members = shuffled[begin : begin + window]
            order += members[np.argsort(self.lengths[members], kind="stable")].tolist()
        found = [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
        yield [found[i] for i in random.permutation(len(found))]

    def room(self, members: Pass) -> int:
        """Positions of the padded array."""
        return len(members) * int(self.lengths[members].max())


@dataclass(frozen=True, eq=False)
class Packed:
    """A fixed budget of tokens per pass, filled with as many rows as fit.

    Rows are shuffled and cut into windows of about 64 passes; each window is packed by first-fit-decreasing
    and its passes are shuffled. Each row comes once an epoch, and no pass holds more tokens than the budget.

    Args:
        lengths: Tokens of each row, (n,).
        batch_tokens: The budget, no less than the longest row.
        seed: Not negative.

    Raises:
        ConfigError: HB102 for a budget that does not hold the longest row.
    """

    lengths: NDArray[np.int64]
    batch_tokens: int
    seed: int

    def __post_init__(self) -> None:
        _refuse_nothing(self.lengths)
        if (longest := int(self.lengths.max())) > self.batch_tokens:
            raise ConfigError(
                "HB102",
                f"a pass of {self.batch_tokens} tokens does not hold a row of {longest}",
                where="train.batch_tokens",
                fix=f"set train.batch_tokens to {longest} or more, or lower data.max_length",
            )

    @property
    def most_tokens(self) -> int:
        """The budget, or all rows where they are fewer tokens."""
        return min(self.batch_tokens, int(self.lengths.sum()))

    @property
    def largest(self) -> Pass:
        """The longest rows that the budget holds together."""
        chosen, left = [], self.batch_tokens
        for row in longest_first(self.lengths):
            if (length := int(self.lengths[row])) <= left:
                chosen.append(row)
                left -= length
        return chosen

    def windows(self, epoch: int, first: int = 0) -> Iterator[list[Pass]]:
        """The passes of an epoch, window by window; those before `first` are not packed."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        tokens = np.cumsum(self.lengths[shuffled])
        count = max(1, round(int(tokens[-1]) / (PACKED_WINDOW * self.batch_tokens)))
        ends = np.searchsorted(tokens, tokens[-1] * np.arange(1, count) / count)
        for window, members in enumerate(np.split(shuffled, ends)):
            if window >= first:
                yield self._pack(members, np.random.default_rng([self.seed, epoch, 1 + window]))

    def _pack(self, members: NDArray[np.int64], random: np.random.Generator) -> list[Pass]:
        decreasing = members[longest_first(self.lengths[members])]
        bins = first_fit(self.lengths[decreasing].tolist(), self.batch_tokens)
        order = decreasing.tolist()
        return [[order[i] for i in bins[chosen]] for chosen in random.permutation(len(bins))]

    def room(self, members: Pass) -> int:
        """The budget."""
        return self.batch_tokens


def longest_first(lengths: NDArray[np.int64]) -> list[int]:
    """Numbers of some rows by decreasing length, equal ones in their order."""
    order: list[int] = np.argsort(-lengths, kind="stable").tolist()
    return order


def _refuse_nothing(lengths: NDArray[np.int64]) -> None:
    if len(lengths) == 0:
        raise DataError("HB203", "got no rows, expected at least one", fix="give rows to train on")


def first_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Put each item into the first bin that has room for it, opening a bin where none has.

    A tree over the bins holds the largest room below each of its nodes, so that the first bin with enough of it
    is found on one walk from the root: n items take O(n log n).

    Args:
        lengths: Sizes, each from 1 to `budget`; in decreasing order for first-fit-decreasing.
        budget: Room of an empty bin.

    Returns:
        Indices of the items of each bin, in the order they were put there.

    Source: Johnson, Near-optimal bin packing algorithms (1973), first-fit-decreasing.
    """
    # At most one bin is left no more than half full, so fewer bins than this are opened.
    most = 2 * math.ceil(sum(lengths) / budget) + 1
    leaves = 1 << (most - 1).bit_length()
    room = [budget] * (2 * leaves)  # node i has the children 2i and 2i + 1; the leaves are the bins
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        room[node] -= length
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            room[node] = left if left > right else right
    return bins


def order_of(lengths: Sequence[int] | NDArray[np.int64], config: TrainConfig, seed: int) -> Packed | Padded:
    """The order that the settings ask for.

    Where rows are packed and no budget is set, a pass holds `batch_size` rows of average length and half a
    row more, so that rows of nearly equal length come `batch_size` at a time; and no less than the longest.

    Args:
        lengths: Tokens of each row.
        config: Settings of the training.
        seed: Not negative.

    Raises:
        ConfigError: HB102 for a budget that does not hold the longest row.
        DataError: HB203 without rows.
    """
    tokens = np.asarray(lengths, np.int64)
    if not config.packing:
        return Padded(tokens, config.batch_size, seed)
    _refuse_nothing(tokens)
    derived = max(int(tokens.max()), math.ceil((config.batch_size + 0.5) * float(tokens.mean())))
    return Packed(tokens, config.batch_tokens or derived, seed)


def passes_in(order: Order, epoch: int) -> int:
    """Forward and backward passes of an epoch."""
    return sum(map(len, order.windows(epoch)))


@dataclass(frozen=True)
class Usage:
    """How full some passes are.

    Args:
        passes: Their number.
        rows_per_pass: On average.
        batch_tokens: Token budget of a pass; None where rows are padded.
        fill: Share of the passes' room that holds tokens.
    """

    passes: int
    rows_per_pass: float
    batch_tokens: int | None
    fill: float

    @classmethod
    def of(cls, order: Order, epoch: int = 0) -> Usage:
        """Count an epoch's passes."""
        passes = [members for window in order.windows(epoch) for members in window]
        return cls(
            passes=len(passes),
            rows_per_pass=len(order.lengths) / len(passes),
            batch_tokens=order.batch_tokens if isinstance(order, Packed) else None,
            fill=int(order.lengths.sum()) / sum(map(order.room, passes)),
        )

    def described(self) -> str:
        """The counts in a few words."""
        kind = f"{self.batch_tokens:,} tokens" if self.batch_tokens else "padded rows"
        return f"{self.passes:,} of {kind}, {self.fill:.1%} full, {self.rows_per_pass:.1f} rows each"


def steps(
    order: Order, passes_per_step: int, position: Position | None = None
) -> Iterator[tuple[list[Pass], Position]]:
    """The passes of each optimizer step, without end, and the position after it.

    The last step of an epoch may have fewer passes. Going on from a position gives the rest of the same
    sequence; only the position's own window is worked out again.

    Args:
        order: The passes.
        passes_per_step: Passes per optimizer step.
        position: A position this function gave; None for the beginning.
    """
    position = position or Position()
    for epoch in itertools.count(position.epoch):
        step: list[Pass] = []
        for window, passes in enumerate(order.windows(epoch, position.window), position.window):
            begin = position.index if window == position.window else 0
            for index, members in enumerate(passes[begin:], begin + 1):
                step.append(members)
                if len(step) == passes_per_step:
                    yield step, Position(epoch, window, index)
                    step = []
        position = Position(epoch + 1)
        if step:
            yield step, position
