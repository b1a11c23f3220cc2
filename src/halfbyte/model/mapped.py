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
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.direct import HUGE_PAGE, read_direct
from halfbyte.model.stored import StoredTensor

_DONTNEED = 4
_HUGEPAGE = 14
_POPULATE_READ = 22  # Linux 5.14; unlike touching a page, a failure is an error and no signal
_MAP_FIXED = 0x10
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value


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
        inside = _whole_pages(extent)
        if sys.platform == "linux" and inside.end - inside.begin >= HUGE_PAGE and self._put(inside):
            self.fetched.add(inside)
        else:
            self.bring(extent)

    def _put(self, pages: Extent) -> bool:
        """Read pages into memory of the process's own and put it in the mapping's place; False where that fails."""
        libc, length, target = _libc(), pages.end - pages.begin, self.raw.data_ptr() + pages.begin
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        start = libc.mmap(None, length + HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
        if start == _FAILED:
            return False
        first = start + (target - start) % HUGE_PAGE  # huge pages here are huge pages there
        last, end = first + length, start + length + HUGE_PAGE
        for begin, stop in ((start, first), (last, end)):
            if stop > begin:
                libc.munmap(begin, stop - begin)
        libc.madvise(first, length, _HUGEPAGE)
        into = memoryview((ctypes.c_char * length).from_address(first)).cast("B")
        if read_direct(self.path, pages.begin, into) == length:
            del into
            libc.mprotect(first, length, mmap.PROT_READ)
            if libc.mremap(first, length, length, _MREMAP_MAYMOVE | _MREMAP_FIXED, target) == target:
                return True
        libc.munmap(first, length)
        return False

    def let_go(self, extent: Extent) -> None:
        """Let the system use an extent's pages for something else; they stay in its cache while there is room."""
        inside = _whole_pages(extent)
        if inside in self.fetched:
            where, length = self.raw.data_ptr() + inside.begin, inside.end - inside.begin
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if _libc().mmap(where, length, mmap.PROT_READ, flags, self.handle, inside.begin) == _FAILED:
                return  # it stays, and is right
            self.fetched.remove(inside)
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

    def _pages(self, extent: Extent) -> tuple[int, int]:
        """Address and length of the whole pages around an extent."""
        first = self.raw.data_ptr()
        begin = (first + extent.begin) & -mmap.PAGESIZE
        return begin, first + extent.end - begin


def _whole_pages(extent: Extent) -> Extent:
    """Those that lie wholly within an extent."""
    return Extent(
        -(-extent.begin // mmap.PAGESIZE) * mmap.PAGESIZE, extent.end // mmap.PAGESIZE * mmap.PAGESIZE
    )


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
    """`madvise(2)`; 0, or the error's number. The interpreter's lock is free while it runs."""
    return 0 if _libc().madvise(address, length, advice) == 0 else ctypes.get_errno()


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.madvise.argtypes = libc.mprotect.argtypes = (pointer, size, number)
    libc.munmap.argtypes = (pointer, size)
    libc.mmap.argtypes = (pointer, size, number, number, number, ctypes.c_int64)
    libc.mmap.restype = pointer
    if sys.platform == "linux":
        libc.mremap.argtypes = (pointer, size, size, number, pointer)
        libc.mremap.restype = pointer
    return libc
