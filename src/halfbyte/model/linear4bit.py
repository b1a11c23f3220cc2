"""A linear layer whose frozen weight is held in 4 bits.

It owns the module around a `Weight4bit`; it must not know how the weight was made or which kernel multiplies
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.quant.weight import QuantSpec, Scales, Weight4bit, WeightParts

_PARTS = ("codes", "scales", "codebook", "nested_scales", "nested_codebook", "offset")
_FACTS = frozenset(
    (
        *("device", "dtype", "grad", "is_leaf", "is_meta", "layout", "requires_grad"),
        *("dim", "element_size", "is_complex", "is_floating_point", "ndim", "numel", "shape", "size"),
    )
)


class HeldWeight(Tensor):
    """What other libraries find as the weight of a layer in 4 bits: its shape and place, without values.

    PEFT asks a weight where it lies before it puts an adapter beside it. A library that goes on to read values, or to
    write them, as merging an adapter or DoRA does, would compute with something else than the weight: it is refused.
    """

    _is_hf_initialized = True  # transformers gives random values to weights that do not say so

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Attributes come as the descriptor's `__get__` and `__set__`.
        asked = func.__name__ if not func.__name__.startswith("__") else _name_of(func)
        if asked in _FACTS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise ModelError(
            "HB345",
            f"a library asks for `{asked}` of a weight that is held in 4 bits",
            fix="merge, or train DoRA, on the 16-bit folder; halfbyte.add_lora(dora=True) trains DoRA in 4 bits",
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"HeldWeight(shape={tuple(self.shape)}, in 4 bits)"


def _name_of(method: Callable[..., Any]) -> str:
    """The attribute that a descriptor's method reads or writes, or the method's own name."""
    descriptor = getattr(method, "__self__", None)
    return str(getattr(descriptor, "__name__", method.__name__))


class Linear4bit(nn.Linear):
    """`y = x · W̃ᵀ + b` with W̃ (N, K) in 4 bits and frozen.

    The weight's tensors are buffers, so that moving the module, its state and its memory are what torch
    sees. It has no weight parameter, and changing the module's dtype leaves the weight as it is. It is a linear layer
    to whoever looks for one, so that PEFT puts its adapters beside it as beside any other.

    Args:
        weight: The quantised (N, K) weight.
        bias: (N,) or None; frozen with the rest.
        from_conv1d: Whether the layer it replaces stored its weight as (K, N), as GPT-2's do.
        scales: How the scales were found, and will be when the layer is to hold another weight.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    nested_scales: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        weight: Weight4bit,
        bias: Tensor | None = None,
        *,
        from_conv1d: bool = False,
        scales: Scales = "absmax",
    ) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make a dense weight
        self._found_scales = scales
        self.out_features, self.in_features = weight.shape
        self.from_conv1d = from_conv1d
        self._dtype, self._format, self._blocksize = weight.dtype, weight.format, weight.blocksize
        parts = weight.tensors()
        for name in _PARTS:
            self.register_buffer(name, parts.get(name))
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> HeldWeight:  # type: ignore[override]
        """(N, K), without values: see `quantised_weight` for these."""
        shape = (self.out_features, self.in_features)
        return self.codes.reshape(-1)[:1].expand(shape).as_subclass(HeldWeight)

    @property
    def quantised_weight(self) -> Weight4bit:
        """The (N, K) weight, of the tensors this module holds now."""
        return Weight4bit(
            shape=(self.out_features, self.in_features),
            dtype=self._dtype,
            format=self._format,
            blocksize=self._blocksize,
            **{name: getattr(self, name) for name in _PARTS},
        )

    @property
    def quantization(self) -> QuantSpec:
        """How the weight is held."""
        nested = self.nested_scales is not None
        return QuantSpec(self._format, self._found_scales, nested, self._blocksize)

    def hold(self, weight: Tensor) -> None:
        """Hold another (N, K) weight, quantised as the one before."""
        parts = ops.quantize_4bit(weight, self.quantization).tensors()
        for name in _PARTS:
            setattr(self, name, parts.get(name))

    @property
    def factor(self) -> WeightParts:
        """The weight as the operations take it: unlike `quantised_weight` it checks nothing and costs nothing."""
        return WeightParts(
            self.codes,
            self.scales,
            self.codebook,
            self.nested_scales,
            self.nested_codebook,
            self.offset,
            self._blocksize,
            self.out_features,
            self.in_features,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x (..., K) → (..., N) in x's dtype, or in autocast's where that is on, as linear layers do."""
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        return ops.linear_4bit(x, self.quantised_weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as torch does, but keep the weight's parts in their dtype: a cast would change its values."""
        held = {name: getattr(self, name) for name in _PARTS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in held.items():
            now = getattr(self, name)
            if now is not None and now.dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        nested = ", double_quant" if self.nested_scales is not None else ""
        sizes = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{sizes}, {self._format}, blocksize={self._blocksize}{nested}"


def dense_weight(module: nn.Module) -> Tensor:
    """The (N, K) weight in float32 of a module that `is_linear`; of one in 4 bits, the values it holds."""
    if isinstance(module, Linear4bit):
        return ops.dequantize_4bit(module.quantised_weight, torch.float32)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (weight.T if is_conv1d(module) else weight).detach().to(torch.float32)


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    """x (..., K) → x · Wᵀ (..., N) of a module that `is_linear`, without its bias."""
    if isinstance(module, Linear4bit):
        return ops.linear_4bit(x, module.quantised_weight, None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return x @ (weight if is_conv1d(module) else weight.T)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer as transformers builds them, in 16 or 32 bits or in 4.

    Subclasses are not: they may compute something else.
    """
    return type(module) is nn.Linear or isinstance(module, Linear4bit) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (K, N)."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def features(module: nn.Module) -> tuple[int, int]:
    """The (N, K) of a module that `is_linear`."""
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[1], weight.shape[0]
    N, K = module.out_features, module.in_features
    assert isinstance(N, int)
    assert isinstance(K, int)
    return N, K
