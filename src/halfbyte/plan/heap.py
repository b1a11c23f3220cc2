"""What a process takes from the system for the memory it asks for: glibc's allocator, imitated.

It owns that imitation; it must not know what the memory is for.

Memory that was freed in a heap stays resident and is used again where a request fits, so what a process takes is
more than what lives. Large requests have pages of their own. That the end of a heap may be cut off is left out: small
things that live there keep it from that.

Source: glibc 2.36, malloc/malloc.c: `_int_malloc`, `_int_memalign`, `sysmalloc`, `_int_free`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 4096
THRESHOLD = 32 << 20
"""From which size on a request has pages of its own: the most that glibc lets it become. A process begins with
less, and has given back larger requests once it has read its rows."""

ALIGNMENT = 64  # of torch's tensors and the kernels' scratch
_HEADER = 16


Block = tuple[int, int]
"""Begin and size; the begin is negative where a block has pages of its own."""


class Heap:
    """Blocks by address, the free ones by size; the smallest that fits is taken and cut.

    Attributes:
        resident: Bytes taken from the system and touched.
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []  # (size, begin)
        self._begins: dict[int, int] = {}  # of free blocks: begin -> end
        self._ends: dict[int, int] = {}  # and end -> begin
        self._top = 0  # where the blocks end
        self._touched = 0  # how far the heap was ever in use since it was last cut
        self._mapped = 0

    @property
    def resident(self) -> int:
        """Bytes that are resident."""
        return self._touched + self._mapped

    def take(self, nbytes: int) -> Block:
        """A block for so many bytes."""
        size = -(-(nbytes + _HEADER) // ALIGNMENT) * ALIGNMENT
        asked = size + ALIGNMENT + 2 * _HEADER
        at = bisect_left(self._free, (asked, -1))
        if at < len(self._free):
            found, begin = self._free[at]
            self._remove(begin, begin + found)
            if found > size:
                self._insert(begin + size, begin + found)
            return begin, size
        if nbytes >= THRESHOLD and self._top + asked > self._touched:
            pages = -(-(nbytes + ALIGNMENT + _HEADER) // PAGE) * PAGE
            self._mapped += pages
            return -1, pages
        begin = self._top
        self._top += size
        self._touched = max(self._touched, self._top)
        return begin, size

    def give(self, block: Block) -> None:
        """Give a block back."""
        begin, size = block
        if begin < 0:
            self._mapped -= size
            return
        end = begin + size
        if begin in self._ends:
            begin = self._remove(self._ends[begin], begin)[0]
        if end in self._begins:
            end = self._remove(end, self._begins[end])[1]
        if end < self._top:
            self._insert(begin, end)
            return
        self._top = begin

    def _insert(self, begin: int, end: int) -> None:
        insort(self._free, (end - begin, begin))
        self._begins[begin], self._ends[end] = end, begin

    def _remove(self, begin: int, end: int) -> tuple[int, int]:
        del self._free[bisect_left(self._free, (end - begin, begin))]
        del self._begins[begin], self._ends[end]
        return begin, end
