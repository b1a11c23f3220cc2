"""Files past the system's cache: memory that a disk reads into and writes from by itself.

It owns alignment, huge pages, and that nothing is lost where a system does not offer this; it must not know what the
bytes mean.

Through the cache every byte is copied, and its page found, counted and given back: for a file that is read once that
is more work than quantising it. A disk takes memory page by page: in huge pages few requests are enough for much.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 4096
HUGE_PAGE = 1 << 21
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_CACHESTAT = 451  # Linux 6.5, the same number on every processor


def aligned_bytes(nbytes: int) -> Tensor:
    """Memory of its own that a file may be read into past the cache, in huge pages where the system has them.

    Args:
        nbytes: How much is wanted.

    Returns:
        (≥ nbytes,) uint8, whole pages.
    """
    whole = -(-max(nbytes, 1) // PAGE) * PAGE
    if whole < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, whole), dtype=torch.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # memory that is shared is never huge unasked
    memory = mmap.mmap(-1, whole + HUGE_PAGE, flags=private)
    memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    first = -found.data_ptr() % HUGE_PAGE
    return found[first : first + whole]


def open_direct(file: Path, mode: str) -> io.FileIO | None:
    """A file past the system's cache; None where that is not offered.

    Args:
        file: The file.
        mode: As `open` has it: "r", or "r+" to write.
    """
    if not _DIRECT:
        return None
    try:
        return io.FileIO(file, mode, opener=lambda path, flags: os.open(path, flags | _DIRECT))
    except OSError:
        return None


def read_direct(file: Path, begin: int, into: memoryview) -> int:
    """Read a stretch of a file past the system's cache.

    Args:
        file: The file.
        begin: Of the stretch, a multiple of `PAGE`.
        into: Whole pages of `aligned_bytes`, filled up to the file's end.

    Returns:
        How many bytes were read; fewer than there are where the system does not offer this, or fails: read in the
        ordinary way to learn why.
    """
    done = 0
    if (stream := open_direct(file, "r")) is None:
        return done
    with stream:
        try:
            stream.seek(begin)
            while done % PAGE == 0 and done < len(into) and (got := stream.readinto(into[done:])):
                done += got
        except OSError:
            return done
    return done


def is_cached(file: Path, begin: int, nbytes: int) -> bool:
    """Whether most of a stretch of a file is in the system's cache, so that it is had without the disk.

    Where the system does not say so, it is not.
    """
    if sys.platform != "linux":
        return False
    stretch, pages = (ctypes.c_uint64 * 2)(begin, nbytes), (ctypes.c_uint64 * 5)()
    with file.open("rb", buffering=0) as stream:
        libc = ctypes.CDLL(None, use_errno=True)
        handle, number = ctypes.c_uint(stream.fileno()), ctypes.c_long(_CACHESTAT)
        if libc.syscall(number, handle, ctypes.byref(stretch), ctypes.byref(pages), ctypes.c_uint(0)):
            return False
    return pages[0] * mmap.PAGESIZE * 2 > nbytes


class Stretch(NamedTuple):
    """Bytes of a ring's memory, from `begin` up to `end`."""

    begin: int
    end: int


class Ring:
    """Aligned memory that is given out stretch after stretch, round and round.

    Args:
        nbytes: How much there is. A stretch is never longer.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = aligned_bytes(nbytes)
        self._held: list[Stretch] = []
        self._end = 0

    def take(self, nbytes: int) -> tuple[Stretch, Tensor] | None:
        """The next stretch, and (nbytes,) uint8 that begin at a multiple of `PAGE`; None while it is not free.

        Args:
            nbytes: How much is wanted.
        """
        begin = self._end if self._end + nbytes <= len(self._memory) else 0
        wanted = Stretch(begin, begin + nbytes)
        if any(begin < held.end and held.begin < wanted.end for held in self._held):
            return None
        self._held.append(wanted)
        self._end = -(-wanted.end // PAGE) * PAGE
        return wanted, self._memory[begin : wanted.end]

    def give_back(self, stretch: Stretch) -> None:
        """Have a stretch given out again."""
        self._held.remove(stretch)
