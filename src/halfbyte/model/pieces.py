"""A model folder piece by piece: what is read at once for which place of a file in 4 bits, and what is written of it.

It owns the order, the size and the checks of what is read; it must not know the file format, files or progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Self

from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.model.direct import Ring, Stretch
from halfbyte.model.loading import check_tied, quantised, read_4bit, refuse_not_finite
from halfbyte.model.matching import Entry
from halfbyte.model.quantised_file import Layout
from halfbyte.model.stored import StoredTensor
from halfbyte.quant.formats import entry_names, to_bitsandbytes
from halfbyte.quant.weight import QuantSpec, Weight4bit

PIECE_BYTES = 1 << 23
LEAST_BYTES = 1 << 26
"""Of memory to read into: with two places for the largest the disk waits where these are small."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read at once: a weight that is quantised, or so much of a tensor that is kept as it is.

    Attributes:
        name: Where it goes: of a weight in 4 bits, its codes.
        unit: The unit of that place.
        entry: What the folder holds for that place; None where it holds nothing.
        stored: The bytes that are read; None for a weight that is stored in 4 bits.
        twins: The same bytes under other names, which must be equal.
        offset: Elements of the tensor before these.
        value: What the model computes by itself and no folder holds.
    """

    name: str
    unit: str
    entry: Entry | None = None
    stored: StoredTensor | None = None
    twins: tuple[tuple[Entry, StoredTensor], ...] = ()
    offset: int = 0
    value: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        if self.stored is None:
            return self.entry.nbytes if self.entry is not None else 0
        return self.stored.nbytes * (1 + len(self.twins))

    @property
    def room(self) -> int:
        """Bytes of memory that it takes while it is read."""
        return self.nbytes if self.stored is None else self.stored.room

    def becomes_4bit(self, spec: QuantSpec | None) -> bool:
        """Whether it is a weight that is quantised; None quantises none."""
        return spec is not None and self.entry is not None and self.entry.slot.linear is not None

    def read(self, buffer: Tensor) -> Tensor | Weight4bit:
        """Read it, into a buffer of its `room`, or a weight in 4 bits into memory of its own."""
        if self.value is not None:
            return self.value
        if self.stored is not None:
            return self.stored.pass_through(buffer)
        assert self.entry is not None
        weight = read_4bit(self.entry)
        for stored in self.entry.stored.values():
            stored.drop_from_cache()
        return weight

    def made(self, got: Tensor | Weight4bit, spec: QuantSpec | None) -> dict[str, Tensor]:
        """What is written of it, by name.

        Args:
            got: What was read.
            spec: How weights are quantised; None for a folder that holds them so.

        Raises:
            ModelError: HB311 for weights that are not finite, HB309 for tied ones that differ.
        """
        if isinstance(got, Weight4bit):
            return to_bitsandbytes(self.name, got)
        if self.entry is None or self.stored is None:
            return {self.name: got}
        if spec is not None and self.becomes_4bit(spec):
            try:
                return to_bitsandbytes(self.name, quantised(self.entry.slot, got, spec))
            except KernelError:
                refuse_not_finite(self.stored.name, str(self.stored.file), got)
                raise
        if got.is_floating_point():
            name, last = self.stored.name, self.offset + got.numel() - 1
            where = f"{name} (elements {self.offset:,} to {last:,})"
            refuse_not_finite(where, str(self.stored.file), got)
        kept = got.to(self.entry.slot.dtype)
        for twin, stored in self.twins:
            check_tied(twin, kept, stored.read())
        return {self.name: kept}


def cut(found: list[Entry], tensors: Mapping[str, Tensor], layout: Layout, in_4bit: bool) -> Iterator[Piece]:
    """Everything that is written, in the order of its places.

    Args:
        found: What the folder holds.
        tensors: What the file is to hold, by name.
        layout: Where it holds it.
        in_4bit: Whether the folder's weights are in 4 bits.
    """
    stored: dict[str, list[Entry]] = {}
    for entry in found:
        stored.setdefault(entry.slot.names[0], []).append(entry)
    written = {part for name in stored for part in entry_names(name, layout.tensors)}
    for name, unit in layout.unit_of.items():
        if name in stored:
            first, *others = stored[name]
            if first.is_4bit or (first.slot.linear is not None and not in_4bit):
                yield Piece(name, unit, first, None if first.is_4bit else first.only)
                continue
            each = PIECE_BYTES // first.only.dtype.itemsize
            count = prod(first.slot.shape)
            for offset in range(0, count, each):
                length = min(each, count - offset)
                twins = tuple((twin, twin.only.piece(offset, length)) for twin in others)
                yield Piece(name, unit, first, first.only.piece(offset, length), twins, offset)
        elif name not in written:
            yield Piece(name, unit, value=tensors[name])


class ReadAhead:
    """Pieces in their turn, as many of them read ahead as there is memory for: that of the two largest, or a little.

    Args:
        pieces: What is read.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = deque(pieces)
        largest = max((piece.room for piece in pieces), default=0)
        self._memory = Ring(max(2 * largest, LEAST_BYTES))
        self._coming: deque[tuple[Future[Tensor | Weight4bit], Stretch]] = deque()
        self._reader = ThreadPoolExecutor(1)
        self._ask()

    def __bool__(self) -> bool:
        """Whether a piece is on its way; else memory must be given back before the next one is."""
        return bool(self._coming)

    def next(self) -> tuple[Tensor | Weight4bit, Stretch]:
        """What the next piece holds, and the memory that is held for it."""
        coming, held = self._coming.popleft()
        return coming.result(), held

    def give_back(self, held: Stretch) -> None:
        """Say that the memory held for a piece is needed no more."""
        self._memory.give_back(held)
        self._ask()

    def _ask(self) -> None:
        while self._pieces and (taken := self._memory.take(self._pieces[0].room)) is not None:
            held, buffer = taken
            self._coming.append((self._reader.submit(self._pieces.popleft().read, buffer), held))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)
