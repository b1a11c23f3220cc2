"""The count of what lives in memory, by what it was made for, and its highest moments.

It owns the sums, and what the allocator makes of them; it must not know tensors, or who tells of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from halfbyte.plan.heap import Block, Heap

OBJECT_BYTES = 700
"""About what torch keeps of a tensor beside its numbers: the tensor, its storage, its node in the graph. They lie
between the numbers of others and keep freed memory from growing together."""

HEAP_SLACK = 0.075
"""Of what comes and goes, how much more a real heap takes than the imitated one: slivers cut off for alignment keep
its free blocks apart. Measured: bench/forecast.py."""


class Event(NamedTuple):
    """Something that changes what lives.

    Attributes:
        phase: What was being done.
        what: `take` for a storage that comes, `give` for one that goes, `call` for one that is of another kind from
            now on, `pass` for memory that is taken and given back at once.
        which: Number of the storage; of `pass` the sizes of its blocks.
        kind: What it is for.
        nbytes: Of a storage that comes.
    """

    phase: str
    what: str
    which: Any
    kind: str
    nbytes: int


class Moment(NamedTuple):
    """What is in memory at one time.

    Attributes:
        phase: What was being done.
        resident: Bytes taken from the system.
        live: Bytes of tensors and scratch by kind, no more than `resident`.
    """

    phase: str
    resident: int
    live: Counter[str]


class Count:
    """Bytes that live, by kind.

    Attributes:
        live: Bytes now, by kind.
        peaks: The moment of most resident memory of each phase.
        mapped: Bytes of files that are in memory, by kind: while something of that kind is at work, else under "".
    """

    def __init__(self) -> None:
        self._heap = Heap()
        self._storages: dict[int, tuple[str, int, tuple[Block, Block]]] = {}
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Moment] = {}
        self.mapped: dict[str, int] = {"": 0}

    @property
    def held(self) -> Counter[str]:
        """Bytes now by kind, with those of mapped files."""
        return self.live + Counter(base=self.mapped[""])

    def play(self, events: Iterable[Event]) -> None:
        """Take note of events that were recorded, as if all happened again."""
        for event in events:
            self.take_note(event)

    def take_note(self, event: Event) -> None:
        """What lives after an event; a storage that is there already does not come again."""
        if event.what == "take":
            self._take(event)
        elif event.what == "give":
            self._give(event.which)
        elif event.what == "call":
            self._call(event.which, event.kind)
        else:
            self._pass(event)

    def _take(self, event: Event) -> None:
        if event.which in self._storages:
            return
        blocks = (self._heap.take(event.nbytes), self._heap.take(OBJECT_BYTES))
        self._storages[event.which] = (event.kind, event.nbytes, blocks)
        self.live[event.kind] += event.nbytes
        self._look(event.phase)

    def _give(self, which: int) -> None:
        if which not in self._storages:
            return
        kind, nbytes, blocks = self._storages.pop(which)
        self.live[kind] -= nbytes
        for block in blocks:
            self._heap.give(block)

    def _call(self, which: int, kind: str) -> None:
        if which in self._storages:
            before, nbytes, blocks = self._storages[which]
            self._storages[which] = (kind, nbytes, blocks)
            self.live[before] -= nbytes
            self.live[kind] += nbytes

    def _pass(self, event: Event) -> None:
        blocks = [self._heap.take(size) for size in event.which]
        self.live[event.kind] += sum(event.which)
        self._look(event.phase, event.kind)
        self.live[event.kind] -= sum(event.which)
        for block in blocks:
            self._heap.give(block)

    def _look(self, phase: str, at_work: str = "") -> None:
        mapped = self.mapped.get(at_work, self.mapped[""])
        heap = self._heap.resident
        churned = heap - self.live["base"] - self.live["adapters"]
        resident = heap + int(HEAP_SLACK * churned) + mapped
        phase = at_work if at_work == "loss" else phase
        known = self.peaks.get(phase)
        so_far = (0, 0) if known is None else (known.resident, known.live.total())
        if (resident, self.live.total() + mapped) > so_far:
            self.peaks[phase] = Moment(phase, resident, self.live + Counter(base=mapped))
