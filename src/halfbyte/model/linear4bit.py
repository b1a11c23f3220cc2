"""A linear layer whose frozen weight is held in 4 bits.

It owns the module around a `Weight4bit`; it must not know how the weight was made or which kernel multiplies
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from halfbyte.kernels import ops
from halfbyte.quant.weight import QuantSpec, Scales, Weight4bit, WeightParts

_PARTS = ("codes", "scales", "codebook", "nested_scales", "nested_codebook", "offset")


class Linear4bit(nn.Module):
    """`y = x · W̃ᵀ + b` with W̃ (N, K) in 4 bits and frozen.

    The weight's tensors are buffers, so that moving the module, its state and its memory are what torch
    sees. It has no weight parameter, and changing the module's dtype leaves the weight as it is.

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
        super().__init__()
        self._found_scales = scales
        self.out_features, self.in_features = weight.shape
        self.from_conv1d = from_conv1d
        self._dtype, self._format, self._blocksize = weight.dtype, weight.format, weight.blocksize
        parts = weight.tensors()
        for name in _PARTS:
            self.register_buffer(name, parts.get(name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

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
        """Multiply: x (..., K) → (..., N) in x's dtype."""
        return ops.linear_4bit(x, self.quantised_weight, self.bias)

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
