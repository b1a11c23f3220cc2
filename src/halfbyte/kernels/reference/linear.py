"""Products of activations with weights in plain PyTorch.

It owns the meaning of these operations and is written to be read; it must not be clever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.reference.weights import dequantize_4bit
from halfbyte.kernels.terms import Factor, Product


def linear(
    products: Sequence[Product], out_dtype: torch.dtype, outs: list[Tensor] | None = None
) -> list[Tensor]:
    """For each product: the sum of `a · Wᵀ` over its terms, plus bias, plus residual, rounded once to `out_dtype`.

    Weights are rounded to the activations' dtype, sums are float32 (float64 for float64).

    Returns:
        (M, N) for each product: `outs` where they are given, of `out_dtype` and with contiguous rows.
    """
    terms = [[_wide(a) @ _dense(f, a.dtype).T for a, f in product.terms] for product in products]
    return _summed(products, terms, out_dtype, outs)


def linear_grad(
    products: Sequence[Product], out_dtype: torch.dtype, outs: list[Tensor] | None = None
) -> list[Tensor]:
    """For each product: the sum of `a · W` over its terms, plus residual; rounding as in `linear`.

    Returns:
        (M, K) for each product: `outs` where they are given.
    """
    terms = [[_wide(a) @ _dense(f, a.dtype) for a, f in product.terms] for product in products]
    return _summed(products, terms, out_dtype, outs)


def _summed(
    products: Sequence[Product], terms: list[list[Tensor]], out_dtype: torch.dtype, outs: list[Tensor] | None
) -> list[Tensor]:
    results = []
    for product, parts in zip(products, terms, strict=True):
        total = torch.stack(parts).sum(dim=0)
        for added in (product.bias, product.residual):
            total = total if added is None else total + added
        results.append(total.to(out_dtype))
    return results if outs is None else [o.copy_(result) for o, result in zip(outs, results, strict=True)]


def _wide(a: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float32))


def _dense(factor: Factor, dtype: torch.dtype) -> Tensor:
    weight = factor if isinstance(factor, Tensor) else dequantize_4bit(factor, dtype)
    return _wide(weight.to(dtype))
