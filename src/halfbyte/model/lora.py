"""LoRA: small trainable matrices beside frozen linear layers.

It owns the adapted layer, where adapters go and which parameters train; it must not know files or training.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.kernels.linear import DTYPES
from halfbyte.model.beside import (
    TrainedBias,
    TrainedModule,
    names_to_train,
    outside,
    train_beside,
    train_biases,
    trained_biases,
    trained_modules,
)
from halfbyte.model.functions import run_projection
from halfbyte.model.linear4bit import Linear4bit, dense_weight, features, is_conv1d, is_linear, multiply
from halfbyte.model.lora_init import INITS, Pair, Site
from halfbyte.model.lora_spec import ALL_LINEAR, DECOMPOSING, LoraSpec, matches, matches_pattern
from halfbyte.model.originals import Originals
from halfbyte.model.peft_layers import is_peft_layer, peft_parts
from halfbyte.model.projection import Branch, Projection
from halfbyte.model.purpose import unread_modules
from halfbyte.model.vocabulary import refuse_resized


class LoraLinear(nn.Module):
    """`y = base(x) + s · (dropout(x) · Aᵀ) · Bᵀ`, the branch computed in x's dtype.

    With DoRA each output is scaled besides: `y = m / ‖W + s · B · A‖ · (x · Wᵀ + s · (x · Aᵀ) · Bᵀ) + b`, the norm
    of each row taken as a constant.

    A (R, K), B (N, R) and m (N,) are float32 parameters, so that small updates are not lost. Where the adapter
    began with something other than zero, the base holds what is left, and `start` is what makes it whole.

    Args:
        base: A linear layer of (N, K), in 4 bits or more; its weight changes only where `spec.init` says so.
        spec: Rank, scale, dropout and beginning.
        generator: Source of the first values; None leaves A and B zero, to be filled.
        original: Makes the weight (N, K) in float32 that the base was made from; None is the base's own.
    """

    origin: Literal["stored", "dequantised"]
    """What a 4-bit base was made from when the adapter began: the folder's weight, or its own values."""
    start_a: Tensor | None
    start_b: Tensor | None
    taken_a: Tensor | None
    taken_b: Tensor | None

    def __init__(
        self,
        base: nn.Module,
        spec: LoraSpec,
        generator: torch.Generator | None = None,
        original: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        N, K = features(base)
        device = next(t for t in (*base.buffers(), *base.parameters())).device
        self.base = base
        self.spec = spec
        self.enabled = True
        self.origin = "stored" if original else "dequantised"
        self.lora_A = nn.Parameter(torch.zeros(spec.r, K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(N, spec.r, device=device))
        for name in ("start_a", "start_b", "taken_a", "taken_b"):
            self.register_buffer(name, None, persistent=False)
        if generator is not None:
            self._begin(generator, original or partial(dense_weight, base))
        self.magnitude = nn.Parameter(self._row_norms()) if spec.dora else None
        trains_bias = spec.bias != "none" and isinstance(base.bias, Tensor)
        self.bias_change = nn.Parameter(torch.zeros(N, device=device)) if trains_bias else None

    @property
    def start(self) -> Pair | None:
        """The pair that with the base makes the original weight; None where the base does so alone."""
        return None if self.start_a is None or self.start_b is None else Pair(self.start_a, self.start_b)

    @property
    def taken(self) -> Pair | None:
        """The pair that was taken from the original weight before the base held it in 4 bits."""
        return None if self.taken_a is None or self.taken_b is None else Pair(self.taken_a, self.taken_b)

    @property
    def weight(self) -> Tensor:
        """The base's, for models that look at its dtype, as T5 does before its last product."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def rescales(self) -> bool:
        """Whether DoRA has a hand in the output."""
        return self.enabled and self.magnitude is not None

    @property
    def trains_bias(self) -> bool:
        """Whether a change of the bias has a hand in the output."""
        return self.enabled and self.bias_change is not None

    def rest_on(self, start: Pair, taken: Pair, weight: Tensor) -> None:
        """Let the base hold a weight (N, K) from which `taken` was taken, and which `start` makes whole."""
        device = self.lora_A.device
        self.start_a, self.start_b = (t.clone().to(device) for t in start)
        if isinstance(self.base, Linear4bit):
            self.base.hold(weight)
            self.taken_a, self.taken_b = (t.clone().to(device) for t in taken)
            return
        held = self.base.weight
        assert isinstance(held, Tensor)
        turned = weight.T.contiguous() if is_conv1d(self.base) else weight
        # A new parameter: the old one may be shared with an embedding.
        self.base.weight = nn.Parameter(turned.to(held.device, held.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Base and branch: x (..., K) → (..., N)."""
        projection = projection_of(self)
        if projection is not None and _computes(projection, x):
            return run_projection(projection, x)
        y = self._scaled(x, self.magnitude) if self.enabled and self.magnitude is not None else self._added(x)
        return y + self.bias_change.to(y.dtype) if self.enabled and self.bias_change is not None else y

    def _added(self, x: Tensor) -> Tensor:
        """The base's output with the branch added."""
        y: Tensor = self.base(x)
        pair = Pair(self.lora_A, self.lora_B) if self.enabled else self.start
        if pair is None:
            return y
        return y + self._branch(F.dropout(x, self.spec.dropout, self.training and self.enabled), pair)

    def _scaled(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """DoRA's output; dropout is before the change only, so the plain product of the base stays in.

        Source: DoRA (arXiv 2402.09353), equation 5 and section 4.3; `DoraLinearLayer` of PEFT.
        """
        norms = self._row_norms()  # (N,)
        # A row of zeros, as pruned models have, has no direction to keep: until it gets one its branch is as it is.
        factor = torch.where(norms > 0, magnitude / norms.where(norms > 0, 1.0), 1.0)
        plain = inner = multiply(self.base, x)
        dropped = x
        if self.training and self.spec.dropout:
            dropped = F.dropout(x, self.spec.dropout)
            inner = multiply(self.base, dropped)
        change = (factor - 1).to(x.dtype) * inner
        y: Tensor = plain + change
        y = y + factor.to(x.dtype) * self._branch(dropped, Pair(self.lora_A, self.lora_B))
        return y + self.base.bias if isinstance(self.base.bias, Tensor) else y

    def _branch(self, x: Tensor, pair: Pair) -> Tensor:
        """s · (x · Aᵀ) · Bᵀ, (..., N)."""
        reduced = F.linear(x, pair.A.to(x.dtype))  # (..., R)
        return self.spec.scale * F.linear(reduced, pair.B.to(x.dtype))

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + s · B · A‖ of each row, (N,) float32."""
        weight = dense_weight(self.base) + self.spec.scale * (self.lora_B @ self.lora_A)
        norms: Tensor = torch.linalg.norm(weight, dim=1)
        return norms

    @torch.no_grad()
    def _begin(self, generator: torch.Generator, original: Callable[[], Tensor]) -> None:
        """Fill A and B as the settings say, and the base with what is left."""
        quantization = self.base.quantization if isinstance(self.base, Linear4bit) else None
        start = INITS[self.spec.init](Site(features(self.base), self.spec, generator, original, quantization))
        self.lora_A.copy_(start.matrices.A)
        self.lora_B.copy_(start.matrices.B)
        if start.taken is not None and start.weight is not None:
            self.rest_on(start.matrices, start.taken, start.weight)

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"r={self.spec.r}, scale={self.spec.scale:g}, dropout={self.spec.dropout}"


def projection_of(module: nn.Module) -> Projection | None:
    """A linear layer as the fused kernels take it, with its branch where it is adapted; None for what they do not.

    They take frozen weights and biases, in 4 bits or dense (N, K), and no DoRA; the adapter may be ours or PEFT's.
    """
    branch, base = None, module
    if isinstance(module, LoraLinear):
        base = module.base
        if module.rescales or module.trains_bias:
            return None
        if module.enabled:
            dropout = module.spec.dropout if module.training else 0.0
            branch = Branch(module.lora_A, module.lora_B, module.spec.scale, dropout)
        elif module.start is not None:
            branch = Branch(*module.start, module.spec.scale)
    elif is_peft_layer(module):
        parts = peft_parts(module)
        if parts is None:
            return None
        base, branch = parts
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
        seed: Decides random first values; the same seed gives the same adapters, whatever happened before.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        ModelError: HB320 naming each target that matches no linear layer, HB322 when there are adapters
            already, HB340 when `spec.init` needs original weights that are not there, HB341 when it asks for more
            than a layer has, HB342 for modules that cannot train whole, HB343 naming each pattern that means no
            adapted layer, HB348 for a bias that cannot train, HB347 when the model's vocabulary was resized.
    """
    names = target_names(model, spec)
    refuse_resized(model)
    beside = names_to_train(model, list(spec.modules_to_save))
    names = outside(names, beside)
    if not names:
        raise ModelError(
            "HB320",
            "every target lies inside a module that trains whole",
            where="lora.modules_to_save",
            fix="name fewer modules there, or use method full",
        )
    biases = biases_outside(model, names) if spec.bias == "all" else []
    _refuse_unused_patterns(spec, names)
    specs = {name: spec.at(name) for name in names}
    if spec.init in DECOMPOSING:
        _refuse_ranks(model, specs)
    wrap(model, specs, torch.Generator().manual_seed(seed))
    train_beside(model, beside)
    train_biases(model, biases)
    return names


def biases_outside(model: nn.Module, adapted: list[str]) -> list[str]:
    """Names of the modules with a bias that are not adapted, in the model's order."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("bias"), Tensor) and name not in adapted
    ]


def _refuse_unused_patterns(spec: LoraSpec, names: list[str]) -> None:
    unused = [
        pattern
        for pattern in (*spec.rank_pattern, *spec.alpha_pattern)
        if not any(matches_pattern(name, pattern) for name in names)
    ]
    if unused:
        raise ModelError(
            "HB343",
            f"{', '.join(map(repr, unused))} means no adapted layer",
            where="lora.rank_pattern, lora.alpha_pattern",
            fix=f"the adapted layers end in {', '.join(sorted({n.rpartition('.')[2] for n in names}))}",
        )


def _refuse_ranks(model: nn.Module, specs: dict[str, LoraSpec]) -> None:
    """A matrix of (N, K) has no more singular vectors than the smaller of the two."""
    faults = [
        f"{name} has {most}, r is {spec.r}"
        for name, spec in specs.items()
        if spec.r > (most := min(features(model.get_submodule(name))))
    ]
    if faults:
        init = next(iter(specs.values())).init
        raise ModelError(
            "HB341",
            f"{init} takes r singular vectors: {', '.join(faults[:5])}",
            where="lora.init",
            fix="lower lora.r, or give these layers a lower rank by lora.rank_pattern",
        )


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
        named = [name for name, module in linear.items() if module is not head]
        return outside(named, unread_modules(model))
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
        generator: Source of the first values, in the order of `specs`; None leaves them zero.

    Raises:
        ModelError: HB322 when there are adapters already, HB340 when original weights are not there.
    """
    refuse_adapted(model)
    originals = _originals(model, specs) if generator is not None else {}
    model.requires_grad_(False)
    for name, spec in specs.items():
        base = model.get_submodule(name)
        adapted = LoraLinear(base, spec, generator, originals.get(name))
        adapted.train(base.training)
        model.set_submodule(name, adapted)


def _originals(model: PreTrainedModel, specs: dict[str, LoraSpec]) -> dict[str, Callable[[], Tensor]]:
    """What reads the weights that 4-bit layers were made from, where their beginning asks for them.

    PiSSA decomposes any weight, so without an original it takes what the layer holds.
    """
    originals = Originals(model)
    sources: dict[str, Callable[[], Tensor]] = {}
    for name, spec in specs.items():
        base = model.get_submodule(name)
        if spec.init in DECOMPOSING and isinstance(base, Linear4bit):
            source = originals.source(name, base)
            if source is not None:
                sources[name] = source
            elif spec.init == "loftq":
                raise ModelError(
                    "HB340",
                    f"{name} is stored in 4 bits: what quantising lost, which loftq restores, is not there",
                    where="lora.init",
                    fix="start from the 16-bit folder, or use pissa or default",
                )
    return sources


def refuse_adapted(model: nn.Module) -> None:
    """Refuse a model that has adapters already: HB322."""
    if adapted_modules(model):
        raise ModelError(
            "HB322",
            "the model has adapters, and a second set is not supported",
            where=type(model).__name__,
            fix="load the base model again and add one adapter",
        )


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
    layers: list[LoraLinear | TrainedModule | TrainedBias] = [
        *adapted_modules(model).values(),
        *trained_modules(model).values(),
        *trained_biases(model).values(),
    ]
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
