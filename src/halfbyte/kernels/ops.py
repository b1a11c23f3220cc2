"""The operations on 4-bit weights: their contract, argument checks, shapes and gradients.

It owns what callers may pass and what they get, registered with torch as `halfbyte::*`; it must not know which
backend computes (`backends`) nor how (`reference` is the specification).

Shapes: N out features, K in features, G = ceil(N·K / blocksize) blocks, M rows of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.kernels.backends import implementation
from halfbyte.kernels.checks import refused
from halfbyte.kernels.library import define
from halfbyte.kernels.terms import Product, Term
from halfbyte.quant.codebook import codebook
from halfbyte.quant.weight import QuantSpec, StoredScales, Weight4bit, WeightParts, decode_scales, nest_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_DTYPES = (*DTYPES, torch.float64)

_WEIGHT = (
    "Tensor codes, Tensor scales, Tensor codebook, Tensor? nested_scales, Tensor? nested_codebook, "
    "Tensor? offset, int blocksize, int N, int K"
)
_SCHEMAS = {
    "block_scales": "(Tensor weight, int blocksize) -> Tensor",
    "search_scales": "(Tensor weight, Tensor codebook, int blocksize) -> Tensor",
    "encode_4bit": "(Tensor weight, Tensor scales, Tensor codebook, int blocksize) -> Tensor",
    "dequantize_4bit": f"({_WEIGHT}, ScalarType dtype) -> Tensor",
    "linear_4bit": f"(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor",
    "linear_4bit_grad": f"(Tensor dy, {_WEIGHT}) -> Tensor",
}


def quantize_4bit(weight: Tensor, spec: QuantSpec | None = None) -> Weight4bit:
    """Quantise a matrix to 4 bits.

    Args:
        weight: (N, K) float32, bfloat16 or float16, any size including odd ones, without NaN or infinity.
        spec: The format; NF4 with absmax scales and double quantization if None.

    Returns:
        The quantised weight; bitsandbytes reads the same numbers from it.

    Raises:
        KernelError: HB401 when the matrix holds NaN or infinity, HB402 for another shape or dtype.

    Source: QLoRA (arXiv 2305.14314), section 3.
    """
    spec = spec or QuantSpec()
    if weight.dim() != 2 or weight.dtype not in DTYPES or weight.numel() == 0:
        raise refused("quantize_4bit", "weight", weight, "a non-empty (N, K) float32, bfloat16 or float16")
    weight = weight.detach().contiguous()
    values = torch.from_numpy(codebook(spec.format).copy())
    scales: Tensor = torch.ops.halfbyte.block_scales(weight, spec.blocksize)
    finite = torch.isfinite(scales)
    if not finite.all():
        what = _first_non_finite(weight, int((~finite).nonzero()[0]) * spec.blocksize)
        raise KernelError("HB401", what, fix="fetch the weights again, or correct what made this number")
    if spec.scales == "mse":
        scales = torch.ops.halfbyte.search_scales(weight, values, spec.blocksize)
    stored = nest_scales(scales) if spec.double_quant else StoredScales(scales)
    if spec.scales == "mse":
        scales = decode_scales(stored)
    return Weight4bit(
        codes=torch.ops.halfbyte.encode_4bit(weight, scales, values, spec.blocksize),
        codebook=values,
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
        format=spec.format,
        blocksize=spec.blocksize,
        **stored._asdict(),
    )


def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix that a quantised weight stands for.

    Args:
        weight: The quantised weight.
        dtype: float32, bfloat16 or float16; the original's if None.

    Returns:
        (N, K); codebook value times scale in float32, rounded once.

    Raises:
        KernelError: HB402 for another dtype.
    """
    dtype = dtype or weight.dtype
    if dtype not in ACTIVATION_DTYPES:
        what = f"dequantize_4bit to {dtype}, expected float32, bfloat16 or float16"
        raise KernelError("HB402", what, fix="ask for one of these and convert the result")
    out: Tensor = torch.ops.halfbyte.dequantize_4bit(*weight.parts(), dtype)
    return out


def linear_4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """`x · Wᵀ + bias` read from the 4-bit codes; differentiable in `x` and `bias`.

    Args:
        x: (..., K) float32, bfloat16 or float16 (float64 through the reference).
        weight: The (N, K) quantised weight, rounded to x's dtype before it is multiplied.
        bias: (N,) in x's dtype, or None.

    Returns:
        (..., N) in x's dtype, summed in float32.

    Raises:
        KernelError: HB402 when shapes, dtypes or devices do not fit.
    """
    N, K = weight.shape
    if x.dtype not in ACTIVATION_DTYPES or x.dim() == 0 or x.shape[-1] != K:
        raise refused("linear_4bit", "x", x, f"(..., {K}) float32, bfloat16 or float16")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (N,)):
        raise refused("linear_4bit", "bias", bias, f"({N},) {x.dtype}")
    if x.device != weight.codes.device:
        raise refused("linear_4bit", "x", x, f"a tensor on {weight.codes.device}, where the weight is")
    y: Tensor = torch.ops.halfbyte.linear_4bit(x.reshape(-1, K), bias, *weight.parts())
    return y.reshape(*x.shape[:-1], N)


def _first_non_finite(weight: Tensor, begin: int) -> str:
    flat = weight.reshape(-1)
    element = begin + int((~torch.isfinite(flat[begin:])).nonzero()[0])
    n, k = divmod(element, weight.shape[1])
    return f"element ({n}, {k}) is {flat[element].item()}, expected a finite number"


def _block_scales(weight: Tensor, blocksize: int) -> Tensor:
    scales: Tensor = implementation("block_scales", weight.dtype)(weight, blocksize)
    return scales


def _search_scales(weight: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    scales: Tensor = implementation("search_scales", weight.dtype)(weight, codebook, blocksize)
    return scales


def _encode_4bit(weight: Tensor, scales: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    codes: Tensor = implementation("encode_4bit", weight.dtype)(weight, scales, codebook, blocksize)
    return codes


def _dequantize_4bit(*weight_and_dtype: Any) -> Tensor:
    *weight, dtype = weight_and_dtype
    out: Tensor = implementation("dequantize_4bit", dtype)(WeightParts(*weight), dtype)
    return out


def _linear_4bit(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    product = Product((Term(x.contiguous(), WeightParts(*weight)),), bias)
    y: Tensor = implementation("linear", x.dtype)([product], x.dtype)[0]
    return y


def _linear_4bit_grad(dy: Tensor, *weight: Any) -> Tensor:
    product = Product((Term(dy.contiguous(), WeightParts(*weight)),))
    dx: Tensor = implementation("linear_grad", dy.dtype)([product], dy.dtype)[0]
    return dx


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *weight = inputs
    parts = WeightParts(*weight)
    ctx.save_for_backward(*parts[:6])
    ctx.sizes = parts[6:]
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    parts = WeightParts(*ctx.saved_tensors, *ctx.sizes)
    dx = torch.ops.halfbyte.linear_4bit_grad(dy, *parts) if ctx.needs_input_grad[0] else None
    dbias = dy.sum(dim=0) if ctx.has_bias and ctx.needs_input_grad[1] else None
    return dx, dbias, *(None for _ in parts)


def _grad_save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save_for_backward(ctx, (None, None, *inputs[1:]), output)


def _grad_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    parts = WeightParts(*ctx.saved_tensors, *ctx.sizes)
    return torch.ops.halfbyte.linear_4bit(ddx, None, *parts), *(None for _ in parts)


def _scales_shape(weight: Tensor, *codebook_and_blocksize: Any) -> Tensor:
    return weight.new_empty(-(-weight.numel() // codebook_and_blocksize[-1]), dtype=torch.float32)


def _codes_shape(weight: Tensor, scales: Tensor, codebook: Tensor, blocksize: int) -> Tensor:
    return weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)


def _matrix_shape(*weight_and_dtype: Any) -> Tensor:
    *weight, dtype = weight_and_dtype
    parts = WeightParts(*weight)
    return parts.codes.new_empty((parts.N, parts.K), dtype=dtype)


def _output_shape(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
    return x.new_empty((x.shape[0], WeightParts(*weight).N))


def _input_shape(dy: Tensor, *weight: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], WeightParts(*weight).K))


_GRADIENTS = {
    "linear_4bit": (_linear_backward, _save_for_backward),
    "linear_4bit_grad": (_grad_backward, _grad_save_for_backward),
}
_COMPUTE_AND_SHAPE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "block_scales": (_block_scales, _scales_shape),
    "search_scales": (_search_scales, _scales_shape),
    "encode_4bit": (_encode_4bit, _codes_shape),
    "dequantize_4bit": (_dequantize_4bit, _matrix_shape),
    "linear_4bit": (_linear_4bit, _output_shape),
    "linear_4bit_grad": (_linear_4bit_grad, _input_shape),
}
for _name, (_compute, _shape) in _COMPUTE_AND_SHAPE.items():
    define(_name, _SCHEMAS[_name], _compute, _shape, _GRADIENTS.get(_name))
