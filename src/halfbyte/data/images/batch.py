"""Rows of images to the arrays a model is given, read and scaled when a pass asks for them and then forgotten.

It owns what one pass over images holds; it must not know models, losses or which images come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.images.pixels import Preprocessor
from halfbyte.data.images.row import ImageRow


@dataclass(frozen=True)
class ImageExample:
    """An image to be shown to a model.

    Attributes:
        row: Where it is.
        tokens: How many a model makes of it, the same for every image.
    """

    row: ImageRow
    tokens: int

    @property
    def id(self) -> str:
        """Content hash of the image and its label."""
        return self.row.id

    @property
    def where(self) -> str:
        """`file`, or `file:index`."""
        return self.row.where

    @property
    def label(self) -> str:
        """Name of its class."""
        return self.row.label

    @property
    def content(self) -> bytes:
        """All that is learnt from it, for a digest."""
        return f"{self.row.content}:{self.label}".encode()


@dataclass(frozen=True)
class ImageBatch:
    """Images of one pass.

    Attributes:
        pixel_values: float32, (B, C, height, width).
        documents: Image, first token, token after the last, int32, (B, 3).
        ids: Content hashes of the images, (B,).
    """

    pixel_values: NDArray[np.float32]
    documents: NDArray[np.int32]
    ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model makes of the images."""
        return int((self.documents[:, 2] - self.documents[:, 1]).sum())

    @property
    def trained_tokens(self) -> int:
        """Answers that carry loss: one for each image."""
        return len(self.ids)


@dataclass(frozen=True)
class ImageCollator:
    """Makes batches of images.

    Args:
        preprocess: How pixels become a model's input; to one size, so that images stand side by side.
    """

    preprocess: Preprocessor

    def __call__(self, examples: Sequence[ImageExample]) -> ImageBatch:
        """Read images, in the order given.

        Raises:
            DataError: HB241 for an image that is not what it was when it was checked.
        """
        tokens = np.array([example.tokens for example in examples], np.int32)
        numbers = np.arange(len(examples), dtype=np.int32)
        return ImageBatch(
            np.stack([self.preprocess(example.row.pixels()) for example in examples]),
            np.stack([numbers, np.zeros_like(tokens), tokens], axis=1),
            tuple(example.id for example in examples),
        )
