"""What a vision transformer is shown: size and colours of an image, and how many tokens it makes of one.

It owns these facts and whether prepared images fit them; it must not know where images come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from halfbyte.data.images.pixels import FILE, Preprocessor, Size
from halfbyte.errors import ModelError


@dataclass(frozen=True)
class Sight:
    """What a model is shown.

    Attributes:
        size: Height and width of an image.
        channels: Its colours.
        tokens: What the model makes of it: patches, and the tokens it puts before them.
    """

    size: Size
    channels: int
    tokens: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sight:
        """Of a vision transformer; weights without memory will do."""
        size = model.config.image_size
        height, width = size if isinstance(size, Iterable) else (size, size)
        positions: Any = model.base_model.get_parameter("embeddings.position_embeddings")  # (1, T, H)
        return cls((height, width), model.config.num_channels, positions.shape[1])

    def check(self, preprocess: Preprocessor, folder: Path) -> None:
        """Refuse images of another size.

        Raises:
            ModelError: HB361.
        """
        if preprocess.size == self.size:
            return
        found = (
            "keep a size of their own"
            if preprocess.size is None
            else f"become {_named(preprocess.size)} pixels"
        )
        raise ModelError(
            "HB361",
            f"images {found}, the model is shown {_named(self.size)}",
            where=str(folder / FILE),
            fix="fetch config.json and preprocessor_config.json from one revision",
        )


def _named(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
