"""Writing a file of a known layout: in one pass, past the system's cache, with a digest of every unit.

It owns how the bytes get to disk; it must not know what they mean, or how they were made.
"""

from __future__ import annotations

import errno
import hashlib
import io
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from halfbyte.model.quantised_file import PAGE, REST, Digests, Layout, bytes_of, digest_of, is_state

STAGE_BYTES = 1 << 23
SYNC_BYTES = 1 << 26
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


class FileWriter:
    """Puts tensors in their places, unit after unit.

    The `rest` may be put at any time, the tensors of the other units in the order of their places. These pass through
    one aligned buffer straight to the disk where the file system allows that; elsewhere the system's cache is written
    out and dropped every 64 MiB, so that neither way gigabytes wait in memory.

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
        self._direct = _open_direct(file)
        self._stage = memoryview(mmap.mmap(-1, STAGE_BYTES))  # pages of its own: aligned
        start = max(layout.units[name].end for name in (REST, *self.sha256))
        self._base, self._filled = start - start % PAGE, start % PAGE
        self._plain.seek(self._base)
        self._plain.readinto(self._stage[: self._filled])
        self._unsynced = 0
        self._hash = hashlib.sha256()
        _write(self._plain, 0, memoryview(layout.header))

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
            _write(self._plain, place.begin + offset, data)
            if is_state(name):
                blanks = b" " * (place.end - place.begin - len(data))
                _write(self._plain, place.end - len(blanks), memoryview(blanks))
            return
        assert place.begin + offset == self._base + self._filled, f"{name} is out of turn"
        self._hash.update(data)
        while data:
            taken = min(len(data), STAGE_BYTES - self._filled)
            self._stage[self._filled : self._filled + taken] = data[:taken]
            data, self._filled = data[taken:], self._filled + taken
            if self._filled == STAGE_BYTES:
                self._flush()
        if self._base + self._filled == self._layout.units[unit].end:
            self._flush()
            self.sha256[unit] = self._hash.hexdigest()
            self._hash = hashlib.sha256()

    def _flush(self) -> None:
        """Write what is staged, in whole pages; the last one is written again when there is more for it."""
        whole, begun = self._filled - self._filled % PAGE, self._filled % PAGE
        length = whole + (PAGE if begun else 0)
        _write(self._plain, self._base, self._stage[:length], self._direct)
        if self._direct is None:
            self._unsynced += length
            if self._unsynced >= SYNC_BYTES:
                self.sync()
        self._stage[:begun] = self._stage[whole : self._filled]
        self._base, self._filled = self._base + whole, begun

    def sync(self) -> None:
        """Have all that was written on the disk, and out of the system's cache."""
        _sync_data(self._plain.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._plain.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0

    def finish(self) -> Digests:
        """End the file where its last tensor ends, have it on the disk, and say what it is."""
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
        self._plain.close()
        if self._direct is not None:
            self._direct.close()


def _open_direct(file: Path) -> io.FileIO | None:
    """The file past the system's cache; None where that is not offered."""
    if not _DIRECT:
        return None
    try:
        return io.FileIO(file, "r+", opener=lambda path, flags: os.open(path, flags | _DIRECT))
    except OSError:
        return None


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
