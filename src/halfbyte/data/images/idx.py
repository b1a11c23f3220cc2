"""IDX files, in which MNIST and its kin come: a header, then bytes.

It owns the format and the names by which images find their labels; it must not know what the images show.
"""

from __future__ import annotations

import gzip
import re
import zlib
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.faults import BadFileError

IMAGES = re.compile(r"(?P<begin>.*)images(?P<dot>[-.])idx3-ubyte(?P<end>\.gz)?")
BYTES = 8
"""Type of elements in the magic number: unsigned bytes."""
MAX_UNPACKED_BYTES = 2**31
"""Most that a compressed file may hold: it is unpacked into memory, one that is not compressed stays on disk."""


def labels_file(images: Path) -> Path:
    """The file of labels that belongs to a file of images: packed as that is, else the other way.

    Args:
        images: A file whose name `IMAGES` matches.
    """
    match = IMAGES.fullmatch(images.name)
    assert match is not None
    plain = images.with_name(f"{match['begin']}labels{match['dot']}idx1-ubyte")
    packed = plain.with_name(f"{plain.name}.gz")
    first, other = (packed, plain) if match["end"] else (plain, packed)
    return first if first.exists() or not other.exists() else other


def read_idx(file: Path, dimensions: int) -> NDArray[np.uint8]:
    """The bytes of an IDX file in its shape; on disk where they are not compressed.

    Args:
        file: Plain, or compressed by gzip if its name ends in .gz.
        dimensions: How many it must have.

    Raises:
        BadFileError: For a header that is not IDX's, or that says something else of the elements, the dimensions or
            the size than is expected or there.

    Source: "The MNIST database of handwritten digits", section "File formats".
    """
    length = 4 + 4 * dimensions
    try:
        if file.suffix != ".gz":
            with file.open("rb") as stream:
                shape = _shape(stream.read(length), dimensions)
            _check_size(shape, file.stat().st_size - length)
            return np.memmap(file, np.uint8, "r", length, shape) if prod(shape) else np.zeros(shape, np.uint8)
        with gzip.open(file) as unpacked:
            shape = _shape(unpacked.read(length), dimensions)
            if prod(shape) > MAX_UNPACKED_BYTES:
                what = f"its header promises {prod(shape):,} bytes, which are not unpacked into memory"
                raise BadFileError(f"{what}; unpack the file with gunzip")
            content = unpacked.read(prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError(f"not readable: {error}") from None
    _check_size(shape, len(content))
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(header: bytes, dimensions: int) -> tuple[int, ...]:
    expected = bytes([0, 0, BYTES, dimensions])
    if len(header) < 4 + 4 * dimensions:
        raise BadFileError(f"ends within its header, after {len(header)} bytes")
    if header[:4] != expected:
        raise BadFileError(
            f"begins with {header[:4].hex()}, expected {expected.hex()}: bytes in {dimensions} dimension(s)"
        )
    return tuple(np.frombuffer(header, ">u4", offset=4).tolist())


def _check_size(shape: tuple[int, ...], got: int) -> None:
    if got != prod(shape):
        sizes = " x ".join(f"{size:,}" for size in shape)
        more = "more than" if got > prod(shape) else f"{got:,} of"
        raise BadFileError(f"its header says {sizes}, it holds {more} {prod(shape):,} bytes")
