"""Files mapped into memory: tensors that are their bytes, and which of these bytes are in memory.

It owns the calls to the operating system; it must not know models, layers or what the bytes mean.

A mapped tensor always has its values: what is not in memory is read when it is touched. Bringing pages in before they
are needed, and letting go of those that are not, changes speed and memory, never a number.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.stored import StoredTensor

_WILLNEED = 3
_DONTNEED = 4
_POPULATE_READ = 22  # Linux 5.14; unlike touching a page, a failure is an error and no signal
_ANNOUNCED = 128 * 1024  # bytes of one announcement: of a larger one, Linux may heed only so many


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
    """

    path: Path
    raw: Tensor

    @classmethod
    def open(cls, path: Path) -> MappedFile:
        """Map a file that is not empty.

        Raises:
            ModelError: HB368 where the system cannot.
        """
        try:
            with path.open("rb") as stream:
                mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as fault:
            raise ModelError(
                "HB368",
                f"the file cannot be mapped into memory: {fault}",
                where=str(path),
                fix="keep the model on a local disk, or copy it there",
            ) from fault
        with warnings.catch_warnings():  # torch would like to write into it; whoever does is stopped
            warnings.simplefilter("ignore", UserWarning)
            return cls(path, torch.frombuffer(mapping, dtype=torch.uint8))

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

    def announce(self, extent: Extent) -> None:
        """Have the system read an extent into its own cache while it has room there; nobody waits for that."""
        begin, length = self._pages(extent)
        for piece in range(begin, begin + length, _ANNOUNCED):
            _advise(piece, min(_ANNOUNCED, begin + length - piece), _WILLNEED)

    def let_go(self, extent: Extent) -> None:
        """Let the system use an extent's pages for something else; they stay in its cache while there is room."""
        if can_let_go():
            _advise(*self._pages(extent), _DONTNEED)

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
    """`madvise(2)`; 0, or the error's number. The interpreter's lock is free while it runs."""
    return 0 if _madvise()(address, length, advice) == 0 else ctypes.get_errno()


@cache
def _madvise() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc.madvise
