"""An adapter's numbers under PEFT's names, as any loader puts them on the original base.

It owns the names of tensors, the change an adapter is to the original weights, and the settings that its layers
have in common; it must not know files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from halfbyte.model.beside import TrainedBias, TrainedModule
from halfbyte.model.lora import LoraLinear
from halfbyte.model.lora_init import Pair
from halfbyte.model.lora_spec import LoraSpec, matches

_Number = TypeVar("_Number", int, float)

PREFIX = "base_model.model."
KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<matrix>[AB])\.weight|lora_(?P<vector>magnitude)_vector|base_layer\.(?P<bias>bias))"
)
TAKEN_KEY = re.compile(r"(?P<origin>stored|dequantised)\.(?P<module>.+)\.lora_(?P<matrix>[AB])")


def change(layer: LoraLinear) -> tuple[LoraSpec, Pair]:
    """What a layer is beside its original weight: rank and scale, A and B.

    An adapter that began with A₀ and B₀ in place of a part of the weight is, with W = Q + s · B₀ · A₀ the original,
    a change by s · (B · A − B₀ · A₀): one of twice the rank.

    Source: `subtract_mutated_init` of PEFT.
    """
    spec, A, B = layer.spec, layer.lora_A.detach(), layer.lora_B.detach()
    if layer.start is None:
        return spec, Pair(A, B)
    pair = Pair(torch.cat([A, layer.start.A]), torch.cat([B, -layer.start.B], dim=1))
    return spec.resized(2 * spec.r), pair


def halves(pair: Pair) -> tuple[Pair, Pair]:
    """The trained pair and the one it began with, of a `change` of twice the rank."""
    r = pair.A.shape[0] // 2
    return Pair(pair.A[:r], pair.B[:, :r]), Pair(pair.A[r:], -pair.B[:, r:])


def adapter_tensors(
    layers: Mapping[str, LoraLinear], beside: Mapping[str, TrainedModule], biases: Mapping[str, TrainedBias]
) -> dict[str, Tensor]:
    """All of an adapter's tensors by PEFT's names.

    Args:
        layers: Adapted layers by name.
        beside: Modules that trained whole, by name.
        biases: Modules whose biases trained and that are not adapted, by name.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        _, pair = change(layer)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pair.B
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude.detach()
        if layer.bias_change is not None:
            tensors[f"{PREFIX}{name}.base_layer.bias"] = changed_bias(layer.base, layer.bias_change)
    for name, biased in biases.items():
        tensors[f"{PREFIX}{name}.bias"] = changed_bias(biased.original, biased.bias_change)
    for name, module in beside.items():
        tensors |= {f"{PREFIX}{name}.{part}": t for part, t in module.trained.state_dict().items()}
    return tensors


def changed_bias(module: nn.Module, change: Tensor) -> Tensor:
    """The bias that trained, in float32."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias.detach().float() + change.detach()


def taken_tensors(layers: Mapping[str, LoraLinear]) -> dict[str, Tensor]:
    """What was taken from the original weights before they were held in 4 bits; empty for most adapters.

    Names begin with the kind of original: `stored` in 16 bits or more, or `dequantised`.
    """
    return {
        f"{layer.origin}.{name}.lora_{matrix}": tensor
        for name, layer in layers.items()
        if layer.taken is not None
        for matrix, tensor in layer.taken._asdict().items()
    }


def common_spec(layers: Mapping[str, LoraLinear]) -> LoraSpec:
    """One spec for all layers as they are saved: the most frequent rank and alpha, patterns for the others."""
    specs = {name: change(layer)[0] for name, layer in layers.items()}
    r = Counter(spec.r for spec in specs.values()).most_common(1)[0][0]
    alpha = Counter(spec.alpha for spec in specs.values()).most_common(1)[0][0]
    return replace(
        next(iter(specs.values())),
        r=r,
        alpha=alpha,
        rank_pattern=_patterns({name: spec.r for name, spec in specs.items()}, r),
        alpha_pattern=_patterns({name: spec.alpha for name, spec in specs.items()}, alpha),
    )


def _patterns(values: Mapping[str, _Number], common: _Number) -> dict[str, _Number]:
    """Names with another value than the common one; the ends of names where they mean these and no others."""
    found: dict[str, _Number] = {}
    for value in dict.fromkeys(values.values()):
        if value != common:
            names = [name for name, each in values.items() if each == value]
            found |= dict.fromkeys(shortest(names, values, matches), value)
    return found


def shortest(names: list[str], among: Iterable[str], means: Callable[[str, str], bool]) -> list[str]:
    """The last parts of the names where they mean these and no others, else the full names.

    Args:
        names: What is to be named, in the order of `among`.
        among: All names there are.
        means: Whether a name is meant by a part.
    """
    ends = sorted({name.rpartition(".")[2] for name in names})
    return ends if [n for n in among if any(means(n, end) for end in ends)] == names else names
