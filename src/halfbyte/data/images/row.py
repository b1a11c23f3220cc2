"""An image with its label, and where its pixels are; they are read when they are wanted and never kept.

It owns the types of a row of images and its content hash; it must not know folders, files of rows or models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.faults import BadRowError
from halfbyte.data.images.decode import Pixels, decode
from halfbyte.errors import DataError


class Picture(Protocol):
    """Where an image's pixels are."""

    def pixels(self) -> Pixels:
        """The pixels, read anew."""


@dataclass(frozen=True, slots=True)
class FilePicture:
    """An image that is a file."""

    file: Path

    def pixels(self) -> Pixels:
        """The pixels, read anew."""
        return decode(self.file)


@dataclass(frozen=True, slots=True, eq=False)
class ArrayPicture:
    """A grey image in an array of many, (n, height, width)."""

    images: NDArray[np.uint8]
    index: int

    def pixels(self) -> Pixels:
        """The pixels, grey in all three colours."""
        return np.repeat(self.images[self.index][:, :, None], 3, axis=2)


@dataclass(frozen=True)
class Pointer:
    """What a file or folder says of one image, before anything is read of it.

    Attributes:
        source: File that says it: the image itself, or the file of rows.
        index: Of a file of rows: which, from 1; of an IDX file from 0; None for an image file.
        picture: Where the pixels are.
        label: Name of its class.
    """

    source: str
    index: int | None
    picture: Picture
    label: str

    @property
    def where(self) -> str:
        """`file`, or `file:index`."""
        return self.source if self.index is None else f"{self.source}:{self.index}"


@dataclass(frozen=True)
class ImageRow:
    """An image that was read whole once.

    Attributes:
        pointer: Where it is and what its class is.
        content: SHA-256 of its size and pixels.
    """

    pointer: Pointer
    content: str

    @property
    def where(self) -> str:
        """`file`, or `file:index`."""
        return self.pointer.where

    @property
    def source(self) -> str:
        """File that says what the image's class is."""
        return self.pointer.source

    @property
    def label(self) -> str:
        """Name of its class."""
        return self.pointer.label

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of its pixels and its label, wherever it stands."""
        return hashlib.sha256(f"{self.content}:{self.label}".encode()).hexdigest()[:16]

    def pixels(self) -> Pixels:
        """Read the pixels again.

        Raises:
            DataError: HB241 if they are not those that were checked.
        """
        try:
            found = self.pointer.picture.pixels()
            if content_of(found) == self.content:
                return found
            what = "its pixels are others"
        except BadRowError as bad:
            what = str(bad)
        fix = "leave the images alone while a run goes on, then begin it anew"
        raise DataError("HB241", what, where=self.where, fix=fix)


def content_of(pixels: Pixels) -> str:
    """SHA-256 of an image's size and pixels."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
