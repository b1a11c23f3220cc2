"""Products of activations with weights on the CPU, several in one call of the compiled module.

It owns the passage of products to the compiled kernels; it must not check arguments (that is `kernels.linear`) nor
compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.terms import Factor, Product
from halfbyte.quant.weight import WeightParts

_Weight = tuple[int, int, int, int, int, float, int, int, int]
_NO_WEIGHT: _Weight = (0, 0, 0, 0, 0, 0.0, 64, 0, 0)


def linear(
    products: Sequence[Product], out_dtype: torch.dtype, outs: list[Tensor] | None = None
) -> list[Tensor]:
    """See `reference.linear`."""
    first = products[0].terms[0].a
    if outs is None:
        outs = [first.new_empty((len(first), product.sizes[0]), dtype=out_dtype) for product in products]
    native().forward(_tuples(products, outs), DTYPES[first.dtype], threads())
    return outs


def linear_grad(
    products: Sequence[Product], out_dtype: torch.dtype, outs: list[Tensor] | None = None
) -> list[Tensor]:
    """See `reference.linear_grad`."""
    if outs is None:
        outs = [p.terms[0].a.new_empty((len(p.terms[0].a), p.sizes[1]), dtype=out_dtype) for p in products]
    native().backward(_tuples(products, outs), DTYPES[products[0].terms[0].a.dtype], threads())
    return outs


def weight_tuple(parts: WeightParts) -> _Weight:
    """A quantised weight as the compiled module takes it."""
    nested = (
        parts.nested_scales is not None and parts.nested_codebook is not None and parts.offset is not None
    )
    return (
        parts.codes.data_ptr(),
        parts.scales.data_ptr(),
        parts.codebook.data_ptr(),
        parts.nested_scales.data_ptr() if nested and parts.nested_scales is not None else 0,
        parts.nested_codebook.data_ptr() if nested and parts.nested_codebook is not None else 0,
        parts.offset.item() if nested and parts.offset is not None else 0.0,
        parts.blocksize,
        parts.N,
        parts.K,
    )


def _tuples(
    products: Sequence[Product], outs: Sequence[Tensor]
) -> list[tuple[list[tuple[int, int, _Weight, int, int, int, int]], int, int, int, int, int, int]]:
    return [
        (
            [_term(term.a, term.factor) for term in product.terms],
            _pointer(product.bias),
            _pointer(product.residual),
            out.data_ptr(),
            out.stride(0),
            DTYPES[out.dtype],
            out.shape[0],
        )
        for product, out in zip(products, outs, strict=True)
    ]


def _term(a: Tensor, factor: Factor) -> tuple[int, int, _Weight, int, int, int, int]:
    if isinstance(factor, Tensor):
        N, K = factor.shape
        return a.data_ptr(), a.stride(0), _NO_WEIGHT, factor.data_ptr(), factor.stride(0), N, K
    return a.data_ptr(), a.stride(0), weight_tuple(factor), 0, 0, factor.N, factor.K


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
