"""Writing a file of a known layout: in one pass, past the system's cache, with a digest of every unit.

It owns how the bytes get to disk; it must not know what they mean, or how they were made.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from halfbyte.model.direct import aligned_bytes, open_direct
from halfbyte.model.quantised_file import PAGE, REST, Digests, Layout, bytes_of, digest_of, is_state

STAGE_BYTES, STAGES = 1 << 22, 4
SYNC_BYTES = 1 << 26
_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class FileWriter:
    """Puts tensors in their places, unit after unit.

    The `rest` may be put at any time, the tensors of the other units in the order of their places. These pass through
    a few aligned buffers, one being filled while the others are written, straight to the disk where the file system
    allows that; elsewhere the system's cache is written out and dropped every 64 MiB, so that neither way gigabytes
    wait in memory. One thread writes everything in its turn, and after the first failure nothing more; whoever puts
    waits for it only when all buffers are full, and learns of a failure then, or when the file is finished.

    Args:
        file: The file; created, or gone on with.
        layout: Where everything goes.
        finished: Units that the file holds already, with their digests: the first ones after the `rest`.
    """

    def __init__(self, file: Path, layout: Layout, finished: Mapping[str, str] | None = None) -> None:
        self.file, self._layout = file, layout
        self.sha256: dict[str, str] = dict(finished or {})
        file.touch()
        self._plain = io.FileIO(file, "r+")
        self._direct = open_direct(file, "r+")
        self._free: list[Any] = [aligned_bytes(STAGE_BYTES).numpy() for _ in range(STAGES)]
        self._stage = self._free.pop()
        self._disk = ThreadPoolExecutor(1)
        self._asked: deque[tuple[Future[None], Any]] = deque()
        self._failed = False
        start = max(layout.units[name].end for name in (REST, *self.sha256))
        self._base, self._filled = start - start % PAGE, start % PAGE
        self._plain.seek(self._base)
        self._plain.readinto(memoryview(self._stage[: self._filled]))
        self._unsynced = 0
        self._hash = hashlib.sha256()
        self._small: list[tuple[int, bytes | memoryview]] = [(0, layout.header)]
        self._small_bytes = len(layout.header)

    def put(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Write a tensor, or a part of one, to its place.

        Args:
            name: Of the tensor in the layout.
            tensor: Its values.
            offset: Bytes of the tensor before these.

        Raises:
            OSError: The disk is full, or fails.
        """
        data, place, unit = bytes_of(tensor), self._layout.tensors[name], self._layout.unit_of[name]
        if unit == REST:
            if is_state(name):
                data = memoryview(bytes(data).ljust(place.end - place.begin))
            self._small_bytes += len(data)
            at_once = self._small_bytes >= STAGE_BYTES
            self._small.append((place.begin + offset, data if at_once else bytes(data)))
            if at_once:
                self._settle()
                self._await()
            return
        assert place.begin + offset == self._base + self._filled, f"{name} is out of turn"
        self._hash.update(data)
        while data:
            taken = min(len(data), STAGE_BYTES - self._filled)
            self._stage[self._filled : self._filled + taken] = np.asarray(data[:taken])  # other threads go on
            data, self._filled = data[taken:], self._filled + taken
            if self._filled == STAGE_BYTES:
                self._flush()
        if self._base + self._filled == self._layout.units[unit].end:
            self._flush()
            self.sha256[unit] = self._hash.hexdigest()
            self._hash = hashlib.sha256()

    def _flush(self) -> None:
        """Have what is staged written, in whole pages; the last one is written again when there is more for it."""
        whole, begun = self._filled - self._filled % PAGE, self._filled % PAGE
        while not self._free:
            self._await_first()
        following = self._free.pop()
        following[:begun] = self._stage[whole : self._filled]
        pages = memoryview(self._stage[: whole + (PAGE if begun else 0)])
        self._ask(partial(self._write_pages, self._base, pages), self._stage)
        self._stage = following
        self._base, self._filled = self._base + whole, begun

    def _write_pages(self, position: int, pages: memoryview) -> None:
        _write(self._plain, position, pages, self._direct)
        if self._direct is None:
            self._unsynced += len(pages)
            if self._unsynced >= SYNC_BYTES:
                self.sync()

    def then(self, do: Callable[[], None]) -> None:
        """Have something done once all that was put is in the file, though perhaps not yet on the disk.

        Raises:
            OSError: Of something before.
        """
        self._settle()
        self._ask(do)

    def _settle(self) -> None:
        small, self._small, self._small_bytes = self._small, [], 0
        self._ask(partial(self._write_small, small))

    def _write_small(self, small: list[tuple[int, bytes | memoryview]]) -> None:
        for position, data in small:
            _write(self._plain, position, memoryview(data))

    def _ask(self, do: Callable[[], None], stage: Any = None) -> None:
        """Have the disk's thread do something, after which a stage is free."""
        while self._asked and self._asked[0][0].done():
            self._await_first()
        self._asked.append((self._disk.submit(self._unless_failed, do), stage))

    def _unless_failed(self, do: Callable[[], None]) -> None:
        if not self._failed:
            self._failed = True
            do()
            self._failed = False

    def _await_first(self) -> None:
        asked, stage = self._asked.popleft()
        if stage is not None:
            self._free.append(stage)
        asked.result()

    def _await(self) -> None:
        while self._asked:
            self._await_first()

    def sync(self) -> None:
        """Have all that is in the file on the disk, and out of the system's cache; for what is done by `then`."""
        _sync_data(self._plain.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def finish(self) -> Digests:
        """End the file where its last tensor ends, have it on the disk, and say what it is."""
        self._settle()
        self._await()
        self._plain.truncate(self._layout.file_bytes)
        self.sync()
        units = self._layout.units
        self.sha256[REST] = digest_of(self.file, units[REST])
        found = {name: (extent, self.sha256[name]) for name, extent in units.items()}
        return Digests(self.file, self._layout.file_bytes, self._layout.header_sha256, found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disk.shutdown()
        self._plain.close()
        if self._direct is not None:
            self._direct.close()


def _write(plain: io.FileIO, position: int, data: memoryview, direct: io.FileIO | None = None) -> None:
    """Write all of it; what cannot go past the system's cache, at the end of a full disk for one, goes through it."""
    if direct is not None:
        direct.seek(position)
        try:
            done = direct.write(data)
        except OSError as fault:
            if fault.errno != errno.EINVAL:
                raise
            done = 0
        position, data = position + done, data[done:]
    plain.seek(position)
    while data:
        data = data[plain.write(data) :]
