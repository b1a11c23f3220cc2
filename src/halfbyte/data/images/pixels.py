"""Pixels as a model was trained to see them: what its `preprocessor_config.json` says, step by step.

It owns that file and the arithmetic of its steps, which is transformers' own to the bit; it must not know where
images come from or what becomes of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.images.decode import Pixels, require_pillow
from halfbyte.errors import DataError

FILE = "preprocessor_config.json"
Size = tuple[int, int]
"""Height and width."""

RESAMPLINGS = range(6)
"""Pillow's numbers of its filters: nearest, lanczos, bilinear, bicubic, box, hamming."""

_HALF = [0.5, 0.5, 0.5]
_VIT: Mapping[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": 2,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": _VIT,
    "DeiT": {**_VIT, "size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
}
"""What a family's processor does where its file says nothing.

Source: transformers, `ViTImageProcessorPil` and `DeiTImageProcessorPil`.
"""

_ENDS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
_SAY_NOTHING = frozenset(
    ("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format")
)
"""Images always come in the colours that the model has; the order of dimensions is the model's own."""


@dataclass(frozen=True)
class Kept:
    """A model folder's `preprocessor_config.json`, as it was read.

    Args:
        text: What it holds.
    """

    text: str

    def save_pretrained(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / FILE).write_text(self.text, encoding="utf-8")


@dataclass(frozen=True)
class Preprocessor:
    """How pixels become a model's input.

    Args:
        channels: 3 for colours, 1 for grey.
        resize: Size to bring the image to, whatever its proportions; None leaves it.
        resample: Pillow's number of the filter.
        crop: Size of the middle that is kept; None keeps all.
        rescale: Factor of the values 0 to 255; None leaves them.
        mean: Subtracted from each channel, (C,); None leaves it.
        std: Then divided by, (C,).
    """

    channels: int
    resize: Size | None
    resample: int
    crop: Size | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def read(cls, folder: Path, channels: int) -> Preprocessor:
        """Read a model folder's.

        Args:
            folder: The model's.
            channels: What its model takes.

        Raises:
            DataError: HB240 if the file is missing, or says what is not done here; all of it is named.
        """
        file = folder / FILE
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            fix = "fetch the file from where the model came from: without it nobody knows what the model was shown"
            raise DataError("HB240", f"it cannot be read: {error}", where=str(file), fix=fix) from error
        faults: list[str] = []
        if isinstance(said, dict):
            steps = _Steps(said, channels, faults)
            found = steps.preprocessor()
        else:
            faults.append(f"it holds a {type(said).__name__}, expected an object")
        if faults:
            fix = "use a model whose images are resized, cropped, rescaled and normalised, and nothing else"
            raise DataError("HB240", "; ".join(faults), where=str(file), fix=fix)
        return found

    @property
    def size(self) -> Size | None:
        """Height and width of what comes out; None where that depends on the image."""
        return self.crop or self.resize

    @property
    def digest(self) -> str:
        """SHA-256 of all that is done to an image."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def __call__(self, pixels: Pixels) -> NDArray[np.float32]:
        """An image as the model takes it.

        Args:
            pixels: (height, width, 3).

        Returns:
            (C, height, width).
        """
        image = grey(pixels) if self.channels == 1 else pixels
        if self.resize is not None and self.resize != image.shape[:2]:
            image = self._resized(image, self.resize)
        values = np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1))  # (C, height, width)
        if self.crop is not None:
            values = centre(values, self.crop)
        scaled = values.astype(np.float32)
        if self.rescale is not None:
            scaled = (values.astype(np.float64) * self.rescale).astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
            scaled = (scaled - mean) / std
        return scaled

    def _resized(self, image: Pixels, size: Size) -> Pixels:
        pillow = require_pillow()
        height, width = size
        resized: Pixels = np.asarray(pillow.Image.fromarray(image).resize((width, height), self.resample))
        return resized


def grey(pixels: Pixels) -> Pixels:
    """Luma of colours, (height, width), rounded as Pillow rounds; grey ones stay as they are.

    Source: ITU-R BT.601, as 16-bit fractions.
    """
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)


def centre(values: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """The middle of an image (C, height, width); zeros stand around one that is smaller."""
    for axis, wanted in enumerate(size, start=1):
        got = values.shape[axis]
        if wanted <= got:
            begin = (got - wanted) // 2
            values = values.take(range(begin, begin + wanted), axis)
        else:
            before = ceil((wanted - got) / 2)
            around = [(0, 0)] * 3
            around[axis] = before, wanted - got - before
            values = np.pad(values, around)
    return values


class _Steps:
    """One file's settings, read with suspicion; what is wrong with them is added to `faults`."""

    def __init__(self, said: Mapping[str, Any], channels: int, faults: list[str]) -> None:
        self.faults, self.channels = faults, channels
        kind = str(said.get("image_processor_type", said.get("feature_extractor_type", "ViTImageProcessor")))
        family = next((kind.removesuffix(end) for end in _ENDS if kind.endswith(end)), kind)
        if family not in DEFAULTS:
            faults.append(f"it is a {kind}, expected one of {', '.join(DEFAULTS)}")
        self.said = {**DEFAULTS.get(family, _VIT), **said}
        for name, value in said.items():
            if name not in _VIT and name not in _SAY_NOTHING and value not in (None, False, {}, []):
                faults.append(f"{name} is {value!r}, which nothing here does")

    def preprocessor(self) -> Preprocessor:
        """All of it; only good for use if no fault was found."""
        resample = self._number("resample") if self._does("do_resize") else 0
        if resample not in RESAMPLINGS:
            self.faults.append(
                f"resample is {resample!r}, expected one of {', '.join(map(str, RESAMPLINGS))}"
            )
        normalises = self._does("do_normalize")
        return Preprocessor(
            channels=self.channels,
            resize=self._size("size") if self._does("do_resize") else None,
            resample=int(resample),
            crop=self._size("crop_size") if self._does("do_center_crop") else None,
            rescale=self._number("rescale_factor") if self._does("do_rescale") else None,
            mean=self._each_channel("image_mean") if normalises else None,
            std=self._each_channel("image_std") if normalises else None,
        )

    def _does(self, name: str) -> bool:
        value = self.said[name]
        if not isinstance(value, bool) and value is not None:
            self.faults.append(f"{name} is {value!r}, expected true or false")
        return bool(value)

    def _number(self, name: str) -> float:
        value = self.said[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            self.faults.append(f"{name} is {value!r}, expected a number")
            return 0
        return value

    def _size(self, name: str) -> Size:
        """Height and width: both in an object, or one number for both."""
        value = self.said[name]
        sizes: list[Any] = [value, value]
        if isinstance(value, dict):
            sizes = [value["height"], value["width"]] if value.keys() == {"height", "width"} else [None]
        if not all(type(size) is int and 0 < size <= 2**13 for size in sizes):
            self.faults.append(f"{name} is {value!r}, expected a height and a width of 1 to 8192 pixels")
            return 1, 1
        return sizes[0], sizes[1]

    def _each_channel(self, name: str) -> tuple[float, ...]:
        value = self.said[name]
        numbers = value if isinstance(value, list) else [value] * self.channels
        good = [
            type(n) in (int, float) and np.isfinite(n) and (n > 0 or name == "image_mean") for n in numbers
        ]
        if not all(good) or len(numbers) != self.channels:
            self.faults.append(
                f"{name} is {value!r}, expected a number for each of {self.channels} channel(s)"
            )
        return tuple(float(n) for n, is_good in zip(numbers, good, strict=True) if is_good)
