"""Pages of the optimizer's state on disk: one file without a name, read ahead and written behind.

It owns that file, its space, and the two buffers that stand for it in memory; it must not know what the bytes mean.

Pages are read and written with explicit offsets by one background thread: what is needed next while something is
computed, then what was computed. What was written leaves the page cache too, so that neither this process nor the
system's memory grows with the state.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import TrainError

LINE = 64
"""Arrays begin at multiples of this many bytes, in pages and in buffers."""

BUFFER_BYTES = 16 << 20
"""Of each of the two buffers, at most."""

_REMEMBERED = (
    8  # writes that may still be on their way to the disk and are asked to leave the page cache again
)


class Pages(Protocol):
    """Where pages lie."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `offset` on."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at `offset`."""

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """An array of `count` entries at `offset`, which shows what was written, without taking memory until read."""

    def release(self) -> None:
        """Give back the memory that reading views took."""


MakePages = Callable[[int], Pages]
"""Makes pages for so many bytes, all zero."""


class PageFile:
    """Pages in a file that has no name: nothing is left of it when the process ends, however it ends.

    Args:
        folder: In which file system; the folder itself, or the nearest one above that is there.
        size: Bytes, > 0, all of which are reserved at once.

    Raises:
        TrainError: HB514 where the disk has no room for them.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._mapping = mmap.mmap(file.fileno(), size)
                self._file = os.dup(file.fileno())
        except OSError as error:
            free = shutil.disk_usage(self._folder).free
            raise TrainError(
                "HB514",
                f"the optimizer's state takes {size / 1e9:.3f} GB on disk, {free / 1e9:.3f} GB are free "
                f"({error.strerror})",
                where=str(self._folder),
                fix="make room, choose another output folder, or take train.optimizer: paged_adamw_8bit",
            ) from error
        weakref.finalize(self, os.close, self._file)
        self._written: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`.

        Raises:
            TrainError: HB515.
        """
        self._move(os.preadv, "read", offset, into)

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes, which then leave the page cache as soon as they are on disk.

        Raises:
            TrainError: HB515.
        """
        self._move(os.pwritev, "written", offset, data)
        self._written.append((offset, data.nbytes))
        for begin, length in self._written:
            os.posix_fadvise(self._file, begin, length, os.POSIX_FADV_DONTNEED)

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """An array that is mapped."""
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(np.frombuffer(self._mapping, kind, count, offset))

    def release(self) -> None:
        """Give back what views took."""
        self._mapping.madvise(mmap.MADV_DONTNEED)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _move(
        self, call: Callable[[int, Sequence[memoryview], int], int], done: str, offset: int, data: memoryview
    ) -> None:
        at = 0
        try:
            while at < data.nbytes:
                moved = call(self._file, [data[at:]], offset + at)
                if moved == 0:
                    raise OSError(errno.EIO, "the file ends early")
                at += moved
        except OSError as error:
            free = shutil.disk_usage(self._folder).free
            raise TrainError(
                "HB515",
                f"{data.nbytes} bytes of the optimizer's state cannot be {done}: {error.strerror}, "
                f"{free / 1e9:.3f} GB are free",
                where=str(self._folder),
                fix="make room or mend the disk, then go on with the same command and --resume",
            ) from error


class Discarded:
    """Pages that are read as zeros and never kept: for one step that is only tried.

    Args:
        size: Bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, offset: int, into: memoryview) -> None:
        """Zeros."""
        np.frombuffer(into, np.uint8).fill(0)

    def write(self, offset: int, data: memoryview) -> None:
        """Nothing happens."""

    def view(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """Zeros."""
        return torch.zeros(1, dtype=dtype).expand(count)

    def release(self) -> None:
        """Nothing was taken."""


class Span(NamedTuple):
    """Bytes of a piece.

    Attributes:
        offset: Where they lie in the pages.
        place: Where they lie in a buffer.
        length: How many.
    """

    offset: int
    place: int
    length: int


class Buffers:
    """Two buffers, in turn read into, computed on and written from.

    Args:
        nbytes: Of each.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(2)]

    def walk(
        self, pages: Pages, pieces: Sequence[Sequence[Span]], compute: Callable[[int, Tensor], None]
    ) -> None:
        """Bring each piece in, compute on it, put it back; ends when all are written.

        The one thread does as it is told in order: piece i - 1 is written before i + 1 is read into its buffer.

        Args:
            pages: Where the pieces lie.
            pieces: Spans of each.
            compute: Is given a piece's number and the buffer that holds it.

        Raises:
            TrainError: HB515; pieces before the one at fault are written.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="pages") as background:
            written: deque[Future[None]] = deque()
            arriving = [background.submit(self._read, pages, spans, i) for i, spans in enumerate(pieces[:1])]
            for i, spans in enumerate(pieces):
                arriving.pop().result()
                if i + 1 < len(pieces):
                    arriving.append(background.submit(self._read, pages, pieces[i + 1], i + 1))
                compute(i, self._buffers[i % 2])
                written.append(background.submit(self._write, pages, spans, i))
                while written and written[0].done():
                    written.popleft().result()
            for last in written:
                last.result()

    def _read(self, pages: Pages, spans: Sequence[Span], number: int) -> None:
        for span in _joined(spans):
            pages.read(span.offset, self._part(span, number))

    def _write(self, pages: Pages, spans: Sequence[Span], number: int) -> None:
        for span in _joined(spans):
            pages.write(span.offset, self._part(span, number))

    def _part(self, span: Span, number: int) -> memoryview:
        return self._buffers[number % 2].numpy().data[span.place : span.place + span.length]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans that follow each other in pages and buffer alike, gaps included, as one: a parameter in one piece."""
    joined: list[Span] = []
    for span in spans:
        before = joined[-1] if joined else None
        if before and span.offset - before.offset == span.place - before.place < before.length + LINE:
            joined[-1] = before._replace(length=span.place - before.place + span.length)
        else:
            joined.append(span)
    return joined
