"""Products of activations with weights in plain PyTorch.

It owns the meaning of these operations and is written to be read; it must not be clever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.reference.weights import dequantize_4bit
from halfbyte.kernels.terms import Factor, Product


def linear(products: Sequence[Product], out_dtype: torch.dtype) -> list[Tensor]:
    """For each product: the sum of `a · Wᵀ` over its terms, plus bias, plus residual, rounded once to `out_dtype`.

    Weights are rounded to the activations' dtype, sums are float32 (float64 for float64).

    Returns:
        (M, N) for each product.
    """
    return [
        _sum(product, [_wide(a) @ _dense(f, a.dtype).T for a, f in product.terms], out_dtype)
        for product in products
    ]


def linear_grad(products: Sequence[Product], out_dtype: torch.dtype) -> list[Tensor]:
    """For each product: the sum of `a · W` over its terms, plus residual; rounding as in `linear`.

    Returns:
        (M, K) for each product.
    """
    return [
        _sum(product, [_wide(a) @ _dense(f, a.dtype) for a, f in product.terms], out_dtype)
        for product in products
    ]


def _sum(product: Product, terms: list[Tensor], out_dtype: torch.dtype) -> Tensor:
    total = torch.stack(terms).sum(dim=0)
    for added in (product.bias, product.residual):
        total = total if added is None else total + added
    return total.to(out_dtype)


def _wide(a: Tensor) -> Tensor:
    return a.to(torch.promote_types(a.dtype, torch.float32))


def _dense(factor: Factor, dtype: torch.dtype) -> Tensor:
    weight = factor if isinstance(factor, Tensor) else dequantize_4bit(factor, dtype)
    return _wide(weight.to(dtype))
