"""One image file to pixels, whole or not at all.

It owns which files are images and what makes one unusable; it must not know labels, folders or what a model wants of
an image. It never loads Pillow unless an image is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.faults import BadRowError
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image

Pixels = NDArray[np.uint8]
"""An image upright in red, green and blue, (height, width, 3)."""

SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 2**26
"""8,192 x 8,192. Larger than any camera's of today but a few; a file of some kilobytes can ask for gigabytes."""

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "La", "RGBa")
"""Pillow's modes that as RGB lose nothing but transparency; others hold numbers beyond 255, which would be cut."""


def require_pillow() -> ModuleType:
    """The package that reads images.

    Raises:
        DataError: HB215 if it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        what = f"reading images needs Pillow: {error}"
        raise DataError("HB215", what, fix="pip install 'halfbyte[images]'") from error
    package: ModuleType = PIL
    return package


def decode(file: Path) -> Pixels:
    """The pixels of a PNG or JPEG file, turned as its EXIF data say; what is transparent is shown as it is stored.

    That is what `load_image` of transformers gives.

    Raises:
        BadRowError: For what is no such file, not whole, or too large.
        DataError: HB215 without Pillow.
    """
    pillow = require_pillow()
    try:
        with pillow.Image.open(file, formats=FORMATS) as opened:
            _refuse_unusable(opened)
            upright = pillow.ImageOps.exif_transpose(opened)
            return np.asarray(upright.convert("RGB"))
    except BadRowError:
        raise
    except (pillow.Image.DecompressionBombError, pillow.Image.DecompressionBombWarning):
        raise BadRowError(f"more than {MAX_PIXELS:,} pixels") from None
    except pillow.UnidentifiedImageError:
        raise BadRowError("not an image in PNG or JPEG") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything; it is told, not hidden
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadRowError(f"not a whole image: {first}") from None


def _refuse_unusable(image: Image) -> None:
    """What the header alone tells; no pixel has been read."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadRowError(f"more than {MAX_PIXELS:,} pixels: {width:,} x {height:,}")
    if image.mode not in EIGHT_BITS:
        raise BadRowError(f"its pixels are of Pillow's mode {image.mode}, expected 8 bits per channel")
    if getattr(image, "is_animated", False) and image.format == "PNG":
        raise BadRowError("it is animated, expected one picture")
