"""LoRA: small trainable matrices beside frozen linear layers.

It owns the adapted layer, where adapters go and which parameters train; it must not know files or training.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.kernels.linear import DTYPES
from halfbyte.model.functions import run_projection
from halfbyte.model.linear4bit import Linear4bit, features, is_linear
from halfbyte.model.projection import Branch, Projection

ALL_LINEAR: Literal["all-linear"] = "all-linear"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What adapters are added, and where.

    Attributes:
        r: Rank of the two matrices, ≥ 1.
        alpha: The branch is scaled by alpha / r.
        dropout: Probability with which an input of the branch is zeroed in training, 0 ≤ dropout < 1.
        target_modules: `all-linear` is every linear layer but the output head; else names, each a module's
            full name or the end of it after a dot.
        rank_stabilised: Scale by alpha / √r instead.

    Raises:
        ModelError: HB321 naming every value out of range.

    Source: LoRA (arXiv 2106.09685), section 4.1; rank-stabilised: arXiv 2312.03732.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | Sequence[str] = ALL_LINEAR
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        faults = []
        if self.r < 1:
            faults.append(f"r is {self.r}, expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            faults.append(f"dropout is {self.dropout}, expected 0 ≤ dropout < 1")
        if not math.isfinite(self.alpha):
            faults.append(f"alpha is {self.alpha}, expected a finite number")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            faults.append(
                f"target_modules is {self.target_modules!r}, expected {ALL_LINEAR!r} or a list of names"
            )
        if faults:
            raise ModelError("HB321", "; ".join(faults), where="lora", fix="correct the values named")

    @property
    def scale(self) -> float:
        """Factor of the branch."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)


class LoraLinear(nn.Module):
    """`y = base(x) + s · (dropout(x) · Aᵀ) · Bᵀ`, the branch computed in x's dtype.

    A (R, K) and B (N, R) are float32 parameters, so that small updates are not lost; B starts at zero, so
    that the layer starts as its base.

    Args:
        base: A linear layer of (N, K), in 4 bits or more; it stays as it is.
        spec: Rank, scale and dropout.
        generator: Source of A's first values; None leaves A to be filled.
    """

    def __init__(self, base: nn.Module, spec: LoraSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        N, K = features(base)
        device = next(t for t in (*base.buffers(), *base.parameters())).device
        self.base = base
        self.spec = spec
        self.enabled = True
        self.lora_A = nn.Parameter(torch.zeros(spec.r, K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(N, spec.r, device=device))
        if generator is not None:
            first = torch.empty(spec.r, K)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
            self.lora_A.data.copy_(first)

    def forward(self, x: Tensor) -> Tensor:
        """Base and branch: x (..., K) → (..., N)."""
        projection = projection_of(self)
        if projection is not None and _computes(projection, x):
            return run_projection(projection, x)
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        dropped = F.dropout(x, self.spec.dropout, self.training)
        reduced = F.linear(dropped, self.lora_A.to(x.dtype))  # (..., R)
        return y + self.spec.scale * F.linear(reduced, self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"r={self.spec.r}, scale={self.spec.scale:g}, dropout={self.spec.dropout}"


def projection_of(module: nn.Module) -> Projection | None:
    """A linear layer as the fused kernels take it, with its branch where it is adapted; None for what they do not.

    They take frozen weights, in 4 bits or dense (N, K).
    """
    branch, base = None, module
    if isinstance(module, LoraLinear):
        base = module.base
        if module.enabled:
            dropout = module.spec.dropout if module.training else 0.0
            branch = Branch(module.lora_A, module.lora_B, module.spec.scale, dropout)
    if isinstance(base, Linear4bit):
        return Projection(base.factor, base.bias, branch)
    if type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters()):
        return Projection(base.weight, base.bias, branch)
    return None


def _computes(projection: Projection, x: Tensor) -> bool:
    """Whether the fused kernels take this input: it is where the weight is and of its dtype."""
    if isinstance(projection.factor, Tensor):
        fits = x.dtype == projection.factor.dtype
    else:
        fits = x.dtype in DTYPES and (projection.bias is None or x.dtype == projection.bias.dtype)
    return fits and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def add_lora(model: PreTrainedModel, spec: LoraSpec, seed: int) -> list[str]:
    """Put an adapter beside every targeted linear layer and freeze everything else.

    Args:
        model: A transformers model, in 4 bits or not, without adapters.
        spec: What to add, and where.
        seed: Decides A's first values; the same seed gives the same adapters, whatever happened before.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        ModelError: HB320 naming each target that matches no linear layer, HB322 when there are adapters
            already.
    """
    names = target_names(model, spec)
    wrap(model, dict.fromkeys(names, spec), torch.Generator().manual_seed(seed))
    return names


def target_names(model: PreTrainedModel, spec: LoraSpec) -> list[str]:
    """Names of the linear layers that `spec.target_modules` means, in the model's order.

    Raises:
        ModelError: HB320 naming each target that matches no linear layer, HB321 for an empty list of
            targets, HB322 when there are adapters already.
    """
    refuse_adapted(model)
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if isinstance(spec.target_modules, str):
        head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return [name for name, module in linear.items() if module is not head]
    targets = list(spec.target_modules)
    if not targets:
        raise ModelError(
            "HB321", "target_modules is empty", where="lora.target_modules", fix=f"use {ALL_LINEAR}"
        )
    unmatched = [target for target in targets if not any(matches(name, target) for name in linear)]
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        near = sorted(
            {close for target in unmatched for close in difflib.get_close_matches(target, ends, n=3)}
        )
        raise ModelError(
            "HB320",
            f"{', '.join(map(repr, unmatched))} names no linear layer",
            where="lora.target_modules",
            fix=(f"did you mean {', '.join(near)}? " if near else "")
            + f"The linear layers of {type(model).__name__} end in {', '.join(ends)}",
        )
    return [name for name in linear if any(matches(name, target) for target in targets)]


def wrap(model: PreTrainedModel, specs: dict[str, LoraSpec], generator: torch.Generator | None) -> None:
    """Replace each named linear layer by a `LoraLinear` around it and let nothing but LoRA train.

    Args:
        model: A model without adapters.
        specs: Module name → its adapter.
        generator: Source of the first values of A, in the order of `specs`; None leaves them zero.

    Raises:
        ModelError: HB322 when there are adapters already.
    """
    refuse_adapted(model)
    model.requires_grad_(False)
    for name, spec in specs.items():
        base = model.get_submodule(name)
        adapted = LoraLinear(base, spec, generator)
        adapted.train(base.training)
        model.set_submodule(name, adapted)


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has adapters already: HB322."""
    if adapted_modules(model):
        raise ModelError(
            "HB322",
            "the model has adapters, and a second set is not supported",
            where=type(model).__name__,
            fix="load the base model again and add one adapter",
        )


def matches(name: str, target: str) -> bool:
    """PEFT's rule for one name of a list: the full name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def adapted_modules(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Let the base model answer alone inside the `with` block.

    Raises:
        ModelError: HB322 when the model has no adapter: a comparison with itself would look like no change.
    """
    layers = list(adapted_modules(model).values())
    if not layers:
        raise ModelError(
            "HB322",
            "the model has no adapter to switch off",
            where=type(model).__name__,
            fix="add one with add_lora, or load one with load_adapter",
        )
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
