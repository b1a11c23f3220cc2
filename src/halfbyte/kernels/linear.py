"""Products of activations with weights: several in one call, each a sum of terms that is rounded once.

It owns what callers may pass and what they get, registered with torch as `halfbyte::linear` and `linear_grad`;
it must not know autograd (a caller that plans what is saved calls these), layers, or which backend computes.

Shapes: M rows of activations, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.kernels.backends import implementation
from halfbyte.kernels.library import define
from halfbyte.kernels.terms import Factor, Product, Term, sizes
from halfbyte.quant.weight import WeightParts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TENSORS = 6  # of a quantised weight
_SCHEMA = (
    "(Tensor[] a, Tensor?[] factors, int[] sizes, int[] counts, Tensor?[] biases, Tensor?[] residuals, "
    "ScalarType dtype) -> Tensor[]"
)


def linear(products: Sequence[Product], dtype: torch.dtype | None = None) -> list[Tensor]:
    """For each product the sum of `a · Wᵀ` over its terms, plus bias, plus residual.

    Args:
        products: At least one; all with the same M and dtype. Activations that several terms share are packed once.
        dtype: Of the results; float32 or the activations' own, which None means.

    Returns:
        (M, N) for each product; weights rounded to the activations' dtype, summed in float32, rounded once.

    Raises:
        KernelError: HB402 when shapes, dtypes, strides or devices do not fit.
    """
    _check("linear", products, inner=1)
    rows = {product.terms[0].a.shape[0] for product in products}
    if len(rows) != 1:
        raise _refused("linear", f"products of {sorted(rows)} rows", "one number of rows")
    return _call(torch.ops.halfbyte.linear, products, dtype)


def linear_grad(products: Sequence[Product], dtype: torch.dtype | None = None) -> list[Tensor]:
    """For each product the sum of `a · W` over its terms, plus residual: gradients for the input of linear layers.

    Args:
        products: At least one, without biases, each with its own M; all of one dtype.
        dtype: As in `linear`.

    Returns:
        (M, K) for each product.

    Raises:
        KernelError: HB402 when shapes, dtypes, strides or devices do not fit.
    """
    _check("linear_grad", products, inner=0)
    if any(product.bias is not None for product in products):
        raise _refused("linear_grad", "a bias", "none")
    return _call(torch.ops.halfbyte.linear_grad, products, dtype)


def _check(operation: str, products: Sequence[Product], inner: int) -> None:
    """`inner` is the dimension of a factor that is summed over."""
    if not products or not all(product.terms for product in products):
        raise _refused(operation, "no terms", "at least one for each product")
    dtype = products[0].terms[0].a.dtype
    device = products[0].terms[0].a.device
    for product in products:
        M = product.terms[0].a.shape[0]
        outer = sizes(product.terms[0].factor)[1 - inner]
        for a, factor in product.terms:
            width = sizes(factor)[inner]
            fits = a.dim() == 2 and a.shape == (M, width) and sizes(factor)[1 - inner] == outer
            if not fits or a.dtype != dtype or dtype not in DTYPES or a.device != device:
                raise _refused(
                    operation, f"activations {_said(a)}", f"({M}, {width}) {dtype} for {outer} results"
                )
            if a.stride(1) != 1 and a.shape[1] > 1:
                raise _refused(operation, f"activations of strides {a.stride()}", "contiguous rows")
            _check_factor(operation, factor, dtype, device)
        for name, tensor, shape in (
            ("bias", product.bias, (outer,)),
            ("residual", product.residual, (M, outer)),
        ):
            if tensor is not None and not (
                tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            ):
                raise _refused(operation, f"{name} {_said(tensor)}", f"a contiguous {shape} {dtype}")


def _check_factor(operation: str, factor: Factor, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(factor, Tensor):
        if factor.codes.device != device:
            raise _refused(operation, f"a weight on {factor.codes.device}", f"one on {device}")
        return
    contiguous = factor.shape[1] == 1 or factor.stride(1) == 1
    if factor.dtype != dtype or factor.device != device or not contiguous:
        raise _refused(operation, f"a weight {_said(factor)}", f"{dtype} on {device} with contiguous rows")


def _said(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"


def _refused(operation: str, got: str, expected: str) -> KernelError:
    return KernelError(
        "HB402",
        f"{operation}: {got}, expected {expected}",
        fix="convert it, or call with the weight it belongs to",
    )


def _call(
    operation: torch._ops.OpOverloadPacket, products: Sequence[Product], dtype: torch.dtype | None
) -> list[Tensor]:
    terms = [term for product in products for term in product.terms]
    factors: list[Tensor | None] = []
    numbers: list[int] = []
    for _, factor in terms:
        if isinstance(factor, Tensor):
            factors += [factor, *[None] * (_TENSORS - 1)]
            numbers += [0, *factor.shape]
        else:
            codes, scales, codebook, nested_scales, nested_codebook, offset, *shape = factor
            factors += [codes, scales, codebook, nested_scales, nested_codebook, offset]
            numbers += shape
    outs: list[Tensor] = operation(
        [term.a for term in terms],
        factors,
        numbers,
        [len(product.terms) for product in products],
        [product.bias for product in products],
        [product.residual for product in products],
        dtype or terms[0].a.dtype,
    )
    return outs


def _products(*flat: Any) -> Iterator[Product]:
    """The products that `_call` took apart."""
    a, factors, numbers, counts, biases, residuals = flat
    terms = []
    for i, activations in enumerate(a):
        tensors = factors[_TENSORS * i : _TENSORS * (i + 1)]
        blocksize, N, K = numbers[3 * i : 3 * i + 3]
        factor = tensors[0] if blocksize == 0 else WeightParts(*tensors, blocksize, N, K)  # type: ignore[call-arg]
        terms.append(Term(activations, factor))
    ends = accumulate(counts, initial=0)
    for (begin, end), bias, residual in zip(pairwise(ends), biases, residuals, strict=True):
        yield Product(tuple(terms[begin:end]), bias, residual)


def _linear(*flat: Any) -> list[Tensor]:
    products = list(_products(*flat[:-1]))
    outs: list[Tensor] = implementation("linear", products[0].terms[0].a.dtype)(products, flat[-1])
    return outs


def _linear_grad(*flat: Any) -> list[Tensor]:
    products = list(_products(*flat[:-1]))
    outs: list[Tensor] = implementation("linear_grad", products[0].terms[0].a.dtype)(products, flat[-1])
    return outs


def _linear_shapes(*flat: Any) -> list[Tensor]:
    return [_empty(product, 0, flat[-1]) for product in _products(*flat[:-1])]


def _linear_grad_shapes(*flat: Any) -> list[Tensor]:
    return [_empty(product, 1, flat[-1]) for product in _products(*flat[:-1])]


def _empty(product: Product, outer: int, dtype: torch.dtype) -> Tensor:
    a = product.terms[0].a
    return a.new_empty((a.shape[0], product.sizes[outer]), dtype=dtype)


define("linear", _SCHEMA, _linear, _linear_shapes)
define("linear_grad", _SCHEMA, _linear_grad, _linear_grad_shapes)
