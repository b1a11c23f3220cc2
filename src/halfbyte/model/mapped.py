"""Files mapped into memory: tensors that are their bytes, and which of these bytes are in memory.

It owns the calls to the operating system; it must not know models, layers or what the bytes mean.

A mapped tensor always has its values: what is not in memory is read when it is touched. Bringing pages in before they
are needed, and letting go of those that are not, changes speed and memory, never a number.

`bring` takes pages of the system's cache. `fetch` reads past it, for files of which the cache cannot keep enough to
be of use: a disk may fill huge pages at twice the speed. What was read lies in memory of the process's own, which
then takes the mapping's place in one step.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.direct import HUGE_PAGE
from halfbyte.model.exchanged import PIECE, Exchange, system
from halfbyte.model.stored import StoredTensor

_DONTNEED = 4
_POPULATE_READ = 22  # Linux 5.14; unlike touching a page, a failure is an error and no signal


class Extent(NamedTuple):
    """Bytes of a file, from `begin` up to `end`."""

    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A file whose bytes are read when they are touched, never written.

    Attributes:
        path: The file.
        raw: (bytes,) uint8, all of it.
        handle: Descriptor of the file, open as long as this lives.
        fetched: Where memory of the process's own stands in for the mapping.
    """

    path: Path
    raw: Tensor
    handle: int
    fetched: set[Extent] = field(default_factory=set)
    _exchange: Exchange = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_exchange", Exchange(self.path, self.handle))

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file that is not empty.

        Raises:
            ModelError: HB368 where the system cannot.
        """
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                mapping = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
            except BaseException:
                os.close(handle)
                raise
        except (OSError, ValueError) as fault:
            raise ModelError(
                "HB368",
                f"the file cannot be mapped into memory: {fault}",
                where=str(path),
                fix="keep the model on a local disk, or copy it there",
            ) from fault
        with warnings.catch_warnings():  # torch would like to write into it; whoever does is stopped
            warnings.simplefilter("ignore", UserWarning)
            file = cls(path, torch.frombuffer(mapping, dtype=torch.uint8), handle)
        weakref.finalize(file, os.close, handle)
        return file

    def tensor(self, stored: StoredTensor) -> Tensor | None:
        """A stored tensor as it lies in the file; None where it lies across its elements' boundaries."""
        bytes_of = self.raw[stored.start : stored.start + stored.nbytes]
        if bytes_of.data_ptr() % stored.dtype.itemsize:
            return None
        return bytes_of.view(stored.dtype).view(stored.shape)

    def bytes_of(self, extent: Extent) -> memoryview:
        """The bytes of an extent, for a digest."""
        array: Any = self.raw[extent.begin : extent.end].numpy()
        return memoryview(array)

    def bring(self, extent: Extent) -> None:
        """Have all pages of an extent in memory; other threads go on meanwhile.

        Raises:
            ModelError: HB369 where the file became shorter, or cannot be read.
        """
        begin, length = self._pages(extent)
        if sys.platform == "linux":
            fault = _advise(begin, length, _POPULATE_READ)
            if fault == 0:
                return
            if fault != errno.EINVAL:
                raise ModelError(
                    "HB369",
                    f"bytes {extent.begin:,} to {extent.end:,} cannot be read: {os.strerror(fault)}",
                    where=str(self.path),
                    fix="leave the model's files alone while they are in use; check the disk",
                )
        self.raw[extent.begin : extent.end : mmap.PAGESIZE].sum()  # an older system: touch every page

    def fetch(self, extent: Extent) -> None:
        """Have an extent in memory, read past the system's cache where that is offered.

        Raises:
            ModelError: As `bring`.
        """
        at = extent.begin
        for piece in self._pieces(extent) if sys.platform == "linux" else ():
            if not self._exchange.put(piece.begin, self._address(piece), piece.end - piece.begin):
                break
            self.fetched.add(piece)
            if at < piece.begin:
                self.bring(Extent(at, piece.begin))
            at = piece.end
        if at < extent.end:
            self.bring(Extent(at, extent.end))

    def give_back(self) -> None:
        """Return to the system the memory that fetched pages were in, and that waits to be filled again."""
        self._exchange.give_back()

    def let_go(self, extent: Extent) -> None:
        """Let the system use an extent's pages for something else; they stay in its cache while there is room."""
        for piece in [*self.fetched]:
            within = extent.begin <= piece.begin and piece.end <= extent.end
            if within and self._exchange.take(piece.begin, self._address(piece), piece.end - piece.begin):
                self.fetched.remove(piece)
        if can_let_go():
            for begin, end in self._beside_fetched(extent):
                _advise(begin, end - begin, _DONTNEED)

    def _beside_fetched(self, extent: Extent) -> Iterator[tuple[int, int]]:
        """Addresses of an extent's pages but those where fetched ones of another lie: let go, they would be zeros."""
        begin, length = self._pages(extent)
        first, end = self.raw.data_ptr(), begin + length
        for other in sorted(self.fetched):
            if first + other.begin > begin:
                yield begin, min(end, first + other.begin)
            begin = max(begin, first + other.end)
            if begin >= end:
                return
        yield begin, end

    def _pieces(self, extent: Extent) -> Iterator[Extent]:
        """What of an extent can be exchanged: whole huge pages."""
        first = self.raw.data_ptr()
        begin = (-(-self._address(extent) // HUGE_PAGE) * HUGE_PAGE) - first
        end = (first + extent.end) // HUGE_PAGE * HUGE_PAGE - first
        for at in range(begin, end, PIECE):
            yield Extent(at, min(at + PIECE, end))

    def _address(self, extent: Extent) -> int:
        return self.raw.data_ptr() + extent.begin

    def _pages(self, extent: Extent) -> tuple[int, int]:
        """Address and length of the whole pages around an extent."""
        first = self.raw.data_ptr()
        begin = (first + extent.begin) & -mmap.PAGESIZE
        return begin, first + extent.end - begin


def can_let_go() -> bool:
    """Whether this system lets a process give mapped pages back before it ends."""
    return sys.platform in ("linux", "darwin")


def extents_of(tensors: Sequence[StoredTensor], gap: int = mmap.PAGESIZE) -> list[Extent]:
    """The extents that some tensors of one file cover; those less than `gap` bytes apart are one."""
    found: list[Extent] = []
    for begin, end in sorted((tensor.start, tensor.start + tensor.nbytes) for tensor in tensors):
        if found and begin - found[-1].end < gap:
            found[-1] = Extent(found[-1].begin, max(end, found[-1].end))
        else:
            found.append(Extent(begin, end))
    return found


def _advise(address: int, length: int, advice: int) -> int:
    """`madvise(2)`; 0, or the error's number."""
    return 0 if system().madvise(address, length, advice) == 0 else ctypes.get_errno()
