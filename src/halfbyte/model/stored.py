"""One safetensors file: its header checked to the byte, its tensors read one at a time.

It owns the file format; it must not know folders, modules or which tensors are wanted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.model.direct import PAGE, is_cached, read_direct

# The limit of the format's own reader: a header is a table of contents, and a larger one is an attack.
HEADER_LIMIT_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_FETCH_AGAIN = "fetch the file again: it is not what its author wrote"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in a checked safetensors file.

    Attributes:
        name: Its name in the file.
        file: The safetensors file.
        dtype: Type of its elements.
        shape: Its sizes.
        start: Position of its first byte in the file.
        nbytes: Its length in bytes.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self, buffer: Tensor | None = None) -> Tensor:
        """Read the tensor from disk.

        It is read, not memory-mapped: pages of a mapped file that were touched count as this process's
        memory until the whole file is unmapped.

        Args:
            buffer: (≥ nbytes,) uint8 to read into, reused from tensor to tensor; None takes fresh memory.

        Returns:
            The tensor of its shape and dtype; with a buffer, a view into it.

        Raises:
            ModelError: HB307 when the file ended since it was checked.
        """
        raw = torch.empty(self.nbytes, dtype=torch.uint8) if buffer is None else buffer[: self.nbytes]
        bytes_of: Any = raw.numpy()
        view = memoryview(bytes_of)
        done = 0
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.start)
            while done < self.nbytes:
                got = stream.readinto(view[done:])
                if not got:
                    _damaged(self.file, f"tensor {self.name} ends after {done} of {self.nbytes} bytes")
                done += got
        return raw.view(self.dtype).view(self.shape)

    def pass_through(self, buffer: Tensor) -> Tensor:
        """Read the tensor once, leaving nothing of it in the system's cache.

        It comes straight from the disk where the system offers that and does not hold it already.

        Args:
            buffer: (≥ `room`,) uint8 of `aligned_bytes`.

        Returns:
            The tensor of its shape and dtype, a view into the buffer.

        Raises:
            ModelError: HB307 when the file ended since it was checked.
        """
        before = self.start % PAGE
        end = before + self.nbytes
        if before % self.dtype.itemsize == 0 and not is_cached(self.file, self.start, self.nbytes):
            pages: Any = buffer[: -(-end // PAGE) * PAGE].numpy()
            if read_direct(self.file, self.start - before, memoryview(pages)) >= end:
                return buffer[before:end].view(self.dtype).view(self.shape)
        tensor = self.read(buffer)
        self.drop_from_cache()
        return tensor

    @property
    def room(self) -> int:
        """Bytes of the buffer that it passes through: the whole pages that it lies in."""
        return self.nbytes + 2 * PAGE

    def piece(self, first: int, count: int) -> StoredTensor:
        """So many of its elements from `first` on, as (count,)."""
        each = self.dtype.itemsize
        return replace(self, shape=(count,), start=self.start + first * each, nbytes=count * each)

    def drop_from_cache(self) -> None:
        """Tell the system that its bytes in the file will not be read again soon; their memory is free for others."""
        if hasattr(os, "posix_fadvise"):
            with open(self.file, "rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), self.start, self.nbytes, os.POSIX_FADV_DONTNEED)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, after every check its header allows; no tensor is read.

    Args:
        file: The safetensors file.

    Returns:
        Tensor name → where it lies, in the order of the file's bytes.

    Raises:
        ModelError: HB307 for a file that is cut off, has bytes to spare or contradicts itself, HB310 for a
            type of elements that is not read.

    Source: https://github.com/huggingface/safetensors#format
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT_BYTES):
            limit = max(min(size - 8, HEADER_LIMIT_BYTES), 0)
            _damaged(file, f"header of {length:,} bytes, at most {limit:,} fit (the file has {size:,})")
        header = _parse(file, stream.read(length))
    header.pop("__metadata__", None)
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            _damaged(file, f"tensor {tensor.name} begins at byte {tensor.start:,}, expected {end:,}")
        end += tensor.nbytes
    if end != size:
        _damaged(file, f"the file has {size:,} bytes, its header describes {end:,}")
    return {tensor.name: tensor for tensor in tensors}


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as fault:
        _damaged(file, f"the header is not JSON: {fault}")
    if not isinstance(header, dict):
        _damaged(file, f"the header is a {type(header).__name__}, expected an object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name occurs twice")
    return unique


def _stored(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Check one entry of the header by itself: its type, and that its length is that of its shape."""
    if not isinstance(entry, Mapping):
        _damaged(file, f"the entry of tensor {name} is not an object")
    fields: tuple[Any, ...] = tuple(entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    stored, shape, offsets = fields
    if not isinstance(stored, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        _damaged(file, f"tensor {name} has dtype {stored!r}, shape {shape!r}, data_offsets {offsets!r}")
    if stored not in DTYPES:
        raise ModelError(
            "HB310",
            f"tensor {name} is stored as {stored}, expected one of {', '.join(DTYPES)}",
            where=str(file),
            fix="use a folder whose weights are in float32, bfloat16 or float16",
        )
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[stored].itemsize
    if end - begin != nbytes:
        _damaged(file, f"tensor {name} has {end - begin:,} bytes, its shape {shape} needs {nbytes:,}")
    return StoredTensor(name, file, DTYPES[stored], tuple(shape), data_start + begin, nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _damaged(file: Path, what: str) -> NoReturn:
    raise ModelError("HB307", what, where=str(file), fix=_FETCH_AGAIN)
