"""Modules and biases that train beside a frozen base, and are saved with its adapter.

It owns the float32 copies and changes that train, and when they answer; it must not know adapters, files or training.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.model.linear4bit import Linear4bit, is_linear
from halfbyte.model.lora_spec import matches


class TrainedModule(nn.Module):
    """A module and a copy of it that trains in float32 and answers in its place.

    The copy takes and gives the dtype of the original. Weights that the original shares with other modules are the
    copy's own from then on.

    Args:
        original: A module with parameters, none of its layers in 4 bits.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.trained = copy.deepcopy(original).requires_grad_(True)
        if any(parameter.dtype != torch.float32 for parameter in original.parameters()):
            self.trained.float()
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The weight in use, which transformers asks embeddings and heads for."""
        weight = (self.trained if self.enabled else self.original).weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        if not self.enabled:
            return self.original(*args, **kwargs)
        dtype = next(self.original.parameters()).dtype
        out = self.trained(*map(_in_float32, args), **{key: _in_float32(v) for key, v in kwargs.items()})
        return out.to(dtype) if isinstance(out, Tensor) else out


class TrainedBias(nn.Module):
    """A frozen module and a change of its bias that trains in float32.

    Args:
        original: A module that adds its bias to its output.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.bias_change = nn.Parameter(torch.zeros_like(original.bias, dtype=torch.float32))  # type: ignore[arg-type]
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which transformers asks heads for."""
        weight = self.original.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """As the original's, with its bias changed."""
        y: Tensor = self.original(x)
        return y + self.bias_change.to(y.dtype) if self.enabled else y


def trained_biases(model: nn.Module) -> dict[str, TrainedBias]:
    """The modules whose biases train outside of adapted layers, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedBias)}


def train_biases(model: nn.Module, names: list[str]) -> None:
    """Let the biases of the named modules train.

    Raises:
        ModelError: HB348 naming each module that may do something else with its bias than add it to its output.
    """
    other = [
        f"{name} ({type(model.get_submodule(name)).__name__})"
        for name in names
        if not (is_linear(model.get_submodule(name)) or type(model.get_submodule(name)) is nn.LayerNorm)
    ]
    if other:
        raise ModelError(
            "HB348",
            f"{', '.join(other[:5])} may do something else with its bias than add it to its output",
            where="lora.bias",
            fix="set lora.bias to lora_only or none",
        )
    for name in names:
        module = TrainedBias(model.get_submodule(name))
        model.set_submodule(name, module.train(module.original.training))


def _in_float32(value: Any) -> Any:
    return value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value


def trained_modules(model: nn.Module) -> dict[str, TrainedModule]:
    """The modules that train whole by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedModule)}


def names_to_train(model: nn.Module, wanted: list[str]) -> list[str]:
    """Names of the modules that are meant, in the model's order, each outside of the others.

    Args:
        model: A model without adapters.
        wanted: Full names, or their ends after a dot.

    Raises:
        ModelError: HB342 naming each that names no module with weights, or one that is held in 4 bits.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [name for name in modules if any(matches(name, each) for each in wanted)]
    faults = [
        f"{each!r} names no module" for each in wanted if not any(matches(name, each) for name in found)
    ]
    faults += [
        f"{name} is held in 4 bits, of which no copy can train"
        for name in found
        if any(isinstance(part, Linear4bit) for part in modules[name].modules())
    ]
    faults += [
        f"{name} has no weights" for name in found if not any(True for _ in modules[name].parameters())
    ]
    if faults:
        raise ModelError(
            "HB342",
            "; ".join(faults),
            where="lora.modules_to_save",
            fix="name modules such as embed_tokens, lm_head or a norm; adapt 4-bit layers by lora.target_modules",
        )
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def outside(names: list[str], whole: list[str]) -> list[str]:
    """The names of modules that are none of those that train whole, nor inside one."""
    return [name for name in names if not any(f"{name}.".startswith(f"{each}.") for each in whole)]


def train_beside(model: nn.Module, names: list[str]) -> None:
    """Put a copy that trains in the place of each named module."""
    for name in names:
        module = TrainedModule(model.get_submodule(name))
        model.set_submodule(name, module.train(module.original.training))
