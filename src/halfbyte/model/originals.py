"""The weights a model in 4 bits was made from, read again from its folder one at a time.

It owns where the original of a layer lies and when there is none; it must not know what it is wanted for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.files import ModelFolder, open_model_folder
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.stored_names import StoredNames
from halfbyte.quant.formats import quantised_names


class Originals:
    """The original weights of a model's 4-bit layers.

    Args:
        model: A model that was loaded from a folder; nothing is opened before the first weight is asked for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @cached_property
    def _folder(self) -> ModelFolder:
        path = Path(self._model.name_or_path or "")
        if not self._model.name_or_path or not path.is_dir():
            raise _absent(
                str(path), f"{type(self._model).__name__} was not loaded from a folder that is there"
            )
        return open_model_folder(path)

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Names of the folder's tensors by those of the model's weights."""
        names = StoredNames(self._model)
        known = {f"{name}.weight" for name, _ in self._model.named_modules()}
        return {names.in_model(stored, known): stored for stored in self._folder.tensors}

    @cached_property
    def _in_4bit(self) -> set[str]:
        return set(quantised_names(self._folder.tensors))

    def source(self, name: str, layer: Linear4bit) -> Callable[[], Tensor] | None:
        """Where the weight of a layer comes from before it is quantised; it is found now and read later.

        Args:
            name: The layer's name in the model.
            layer: The layer.

        Returns:
            What reads it as (N, K) float32; None where the folder itself holds it in 4 bits.

        Raises:
            ModelError: HB340 when the folder is gone or has no such weight.
        """
        found = self._stored.get(f"{name}.weight")
        if found is None:
            raise _absent(str(self._folder.path), f"there is no {name}.weight")
        if found in self._in_4bit:
            return None
        stored = self._folder.tensors[found]
        expected = (layer.out_features, layer.in_features)
        if stored.shape != (expected[::-1] if layer.from_conv1d else expected):
            raise _absent(str(stored.file), f"{found} is {stored.shape}, its layer {expected}")

        def read() -> Tensor:
            weight = stored.read().to(torch.float32)
            return weight.T.contiguous() if layer.from_conv1d else weight

        return read


def _absent(where: str, what: str) -> ModelError:
    return ModelError(
        "HB340",
        what,
        where=where,
        fix="load the model from its 16-bit folder and leave that folder in place",
    )
