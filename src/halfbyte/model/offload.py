"""Tensors that wait in a file between forward and backward.

It owns the file, what lies where in it, and the thread that writes and reads; it must not know layers, or what is
chosen to lie there.

The file has no name, so that nothing is left of it however the process ends. One thread writes a layer's tensors
while the next layer computes, and reads one layer ahead of the backward pass: of what waits, one layer at a time is
in memory. What is written may stay in the system's page cache, which gives it back when memory is asked for.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from halfbyte.errors import TrainError

PAGE = 4096  # where each layer's tensors begin, so that no page of the file belongs to two


def file_bytes(nbytes: int) -> int:
    """Bytes of the file that tensors of `nbytes` in all take."""
    return -(-nbytes // PAGE) * PAGE


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


def disk_failed(what: str, folder: Path, error: OSError) -> TrainError:
    """HB521 for an error of the system.

    Args:
        what: What cannot be done.
        folder: Where.
        error: What the system says.
    """
    return TrainError(
        "HB521",
        f"what layers keep on disk cannot {what}: {error.strerror}",
        where=str(folder),
        fix="look at the disk, set output_dir to a folder on another one, or set train.activations to exact; "
        "--resume goes on from the last checkpoint",
    )


class Waiting:
    """Tensors in the file, or on their way there; dropped, their place is free.

    Args:
        tensors: Contiguous.
        begin: Their first byte in the file.
        nbytes: Of all.
    """

    def __init__(self, tensors: dict[str, Tensor], begin: int, nbytes: int) -> None:
        self.begin, self.end = begin, begin + file_bytes(nbytes)
        self.forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self.unwritten: dict[str, Tensor] | None = tensors
        self.written: Future[None] | None = None
        self.read: Future[dict[str, Tensor]] | None = None
        self.is_taken = False


class Offload:
    """A file in which tensors wait, last in first out.

    Args:
        folder: Where the file is made; the nearest folder above, if it is not there.
        reserved_bytes: Size that it has from the beginning.

    Raises:
        TrainError: HB520 where the disk has less room, HB521 where no file can be made.
    """

    def __init__(self, folder: Path, reserved_bytes: int) -> None:
        self.folder = nearest_folder(folder)
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115  (lives as long)
        except OSError as error:
            raise disk_failed("be written", self.folder, error) from error
        self._size = 0
        self._order: list[weakref.ref[Waiting]] = []
        self._last: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "halfbyte-offload")
        weakref.finalize(self, _end, self._thread, self._file)
        self._reserve(reserved_bytes)

    def put(self, tensors: Mapping[str, Tensor]) -> Waiting:
        """Begin to write tensors, once those before are written.

        Args:
            tensors: Not to be changed from now on.

        Returns:
            What `take` asks for.

        Raises:
            TrainError: HB520 where the disk is full, HB521 where it failed.
        """
        below = self._newest()
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        waiting = Waiting(own, below.end if below else 0, sum(tensor.nbytes for tensor in own.values()))
        self._reserve(waiting.end)
        if self._last is not None:
            self._last.result()
        self._last = waiting.written = self._thread.submit(self._write, waiting)
        self._order.append(weakref.ref(waiting))
        return waiting

    def take(self, waiting: Waiting) -> dict[str, Tensor]:
        """Tensors as they were put; the ones that were put before them are read from now on.

        Raises:
            RuntimeError: Asked a second time.
            TrainError: HB521 where the disk failed.
        """
        if waiting.is_taken or waiting.written is None:
            raise RuntimeError(
                "what a layer kept on disk is gone after its backward pass: there is no second"
            )
        waiting.written.result()
        tensors = (waiting.read or self._thread.submit(self._read, waiting)).result()
        waiting.is_taken, waiting.read = True, None
        before = self._newest()
        if before is not None and before.read is None:
            before.read = self._thread.submit(self._read, before)
        return tensors

    def _newest(self) -> Waiting | None:
        """What was put last of what still waits."""
        while self._order:
            newest = self._order[-1]()
            if newest is not None and not newest.is_taken:
                return newest
            self._order.pop()
        return None

    def _reserve(self, nbytes: int) -> None:
        if nbytes <= self._size:
            return
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._size, nbytes - self._size)
            else:
                os.truncate(self._file.fileno(), nbytes)
        except OSError as error:
            disk = os.statvfs(self.folder)
            raise TrainError(
                "HB520",
                f"layers keep {nbytes / 1e9:.2f} GB on disk, of which {self._size / 1e9:.2f} GB are reserved and "
                f"{disk.f_bavail * disk.f_frsize / 1e9:.2f} GB are free: {error.strerror}",
                where=str(self.folder),
                fix="free space there, set output_dir to a folder on another disk, lower train.batch_size (or "
                "batch_tokens), or set train.activations to exact, which computes again instead",
            ) from error
        self._size = nbytes

    def _write(self, waiting: Waiting) -> None:
        tensors = waiting.unwritten
        assert tensors is not None
        versions = [tensor._version for tensor in tensors.values()]
        at = waiting.begin
        try:
            for tensor in tensors.values():
                left = _bytes_of(tensor)
                while left:
                    done = os.pwrite(self._file.fileno(), left, at)
                    left, at = left[done:], at + done
        except OSError as error:
            raise disk_failed("be written", self.folder, error) from error
        if versions != [tensor._version for tensor in tensors.values()]:
            raise RuntimeError("a tensor that a layer keeps for its backward pass was changed in place")
        waiting.unwritten = None

    def _read(self, waiting: Waiting) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in waiting.forms.items()}
        at = waiting.begin
        try:
            for tensor in tensors.values():
                left = _bytes_of(tensor)
                while left:
                    done = os.preadv(self._file.fileno(), [left], at)
                    if done == 0:
                        raise OSError(0, "the file ends before them")
                    left, at = left[done:], at + done
        except OSError as error:
            raise disk_failed("be read back", self.folder, error) from error
        return tensors


def _end(thread: ThreadPoolExecutor, file: IO[bytes]) -> None:
    thread.shutdown(wait=False)
    file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
