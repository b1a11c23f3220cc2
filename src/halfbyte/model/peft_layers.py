"""PEFT's LoRA layers as the fused kernels take them.

It owns which of PEFT's layers compute nothing but `base(x) + s · (dropout(x) · Aᵀ) · Bᵀ`, and where their parts lie;
it must not know our own adapters, files or training. PEFT is looked at only where somebody else has loaded it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from halfbyte.model.projection import Branch


class Parts(NamedTuple):
    """What a LoRA layer of PEFT computes with.

    Attributes:
        base: The linear layer inside.
        branch: The adapter in use; None where none is.
    """

    base: nn.Module
    branch: Branch | None


def is_peft_layer(module: nn.Module) -> bool:
    """Whether a module is PEFT's LoRA around a linear layer; subclasses may compute something else."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    return layers is not None and type(module) is layers.Linear


def peft_parts(module: nn.Module) -> Parts | None:
    """The parts of a module that `is_peft_layer`; None where it computes more than one plain adapter.

    Args:
        module: The layer, whose settings may have changed since the last call.
    """
    layer: Any = module
    if layer.merged:
        return None
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return Parts(layer.base_layer, None)
    name = names[0]
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    plain = type(A) is type(B) is nn.Linear and A.bias is B.bias is None
    if len(names) > 1 or name in layer.lora_variant or not plain:
        return None
    if type(dropout) not in {nn.Dropout, nn.Identity}:
        return None
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Parts(layer.base_layer, Branch(A.weight, B.weight, float(layer.scaling[name]), probability))


def adapter_modules(module: nn.Module) -> Iterator[nn.Module]:
    """What a module that `is_peft_layer` has beside its base: matrices and dropouts, of all its adapters."""
    for name, child in module.named_children():
        if name != "base_layer":
            yield from child.modules()
