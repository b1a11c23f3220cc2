"""Models with adapters that are really changed, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.model.linear4bit import dense_weight
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraLinear
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]

# float32 sums of a few dozen products: each of at most 64 roundings of half a unit in the last place.
FLOAT32_TOLERANCE = 64 * 2.0**-24


def quantised(folder: Path, **settings: Any) -> PreTrainedModel:
    return load(folder, quantization=QuantSpec(**settings), dtype=torch.float32)


def whole(layer: LoraLinear) -> torch.Tensor:
    """The (N, K) weight that a layer stands for, its adapter included."""
    return dense_weight(layer.base) + layer.spec.scale * (layer.lora_B @ layer.lora_A).detach()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def change(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
