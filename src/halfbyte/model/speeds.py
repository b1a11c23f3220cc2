"""How fast a layer computes and a disk writes and reads: measured in a moment, to choose between the two.

It owns the measurement and its numbers; it must not know what is chosen from them.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from halfbyte.kernels.terms import sizes
from halfbyte.model.layer import Layer
from halfbyte.model.offload import disk_failed
from halfbyte.model.projection import project

_TOKENS = 256  # of the product that is timed: enough for its full speed
_DISK_BYTES = 32 << 20


class Speeds(NamedTuple):
    """What it takes to compute again, and to write and read instead.

    Attributes:
        flops_per_s: Of a layer's products; a product and its sum are two.
        write_bytes_per_s: Of the disk, until the bytes are on it.
        read_bytes_per_s: Of the disk, from it and not from memory.
    """

    flops_per_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float


def measure_speeds(layer: Layer, folder: Path) -> Speeds:
    """Time a layer's first product of the MLP, and 32 MiB to a disk and back.

    Args:
        layer: Its parts.
        folder: On the disk; nothing stays there.

    Raises:
        TrainError: HB521 where the disk fails.
    """
    N, K = sum(sizes(p.factor)[0] for p in layer.up), sizes(layer.up[0].factor)[1]
    x = torch.ones(_TOKENS, K, dtype=layer.attention_norm.weight.dtype)
    undropped = (None,) * len(layer.up)
    with torch.no_grad():
        seconds = min(_seconds(lambda: project(x, layer.up, seeds=undropped)) for _ in range(3))
    try:
        write, read = disk_speeds(folder, _DISK_BYTES)
    except OSError as error:
        raise disk_failed("be timed", folder, error) from error
    return Speeds(2 * _TOKENS * N * K / seconds, write, read)


def disk_speeds(folder: Path, nbytes: int) -> tuple[float, float]:
    """Bytes per second of writing until it is on the disk, and of reading after memory has let go of it.

    Args:
        folder: On the disk; nothing stays there.
        nbytes: So many, in whole MiB.

    Raises:
        OSError: The disk fails, or is full.
    """
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            for at in range(0, nbytes, len(block)):
                os.pwrite(file.fileno(), block, at)
            os.fsync(file.fileno())

        def read() -> None:
            for at in range(0, nbytes, len(block)):
                os.pread(file.fileno(), len(block), at)

        written = _seconds(write)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return nbytes / written, nbytes / _seconds(read)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
