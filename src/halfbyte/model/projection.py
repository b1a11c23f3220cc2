"""Linear layers that share an input, with their LoRA branches: forward and backward by formula, no autograd.

It owns the arithmetic of `y = x · W̃ᵀ + b + s · (dropout(x) · Aᵀ) · Bᵀ` and its gradients for x, A and B; it must not
know modules, layers of a network, or what its caller keeps.

Shapes: M tokens, K in features, N out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.linear import linear, linear_grad
from halfbyte.kernels.terms import Factor, Product, Term


@dataclass(frozen=True, slots=True)
class Branch:
    """A LoRA branch.

    Attributes:
        A: (R, K) float32.
        B: (N, R) float32.
        scale: Factor of the branch.
        dropout: Probability with which an input is zeroed; 0 outside of training.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and what trains beside it.

    Attributes:
        factor: The (N, K) weight, in 4 bits or dense.
        bias: (N,) or None.
        branch: None where nothing trains.
    """

    factor: Factor
    bias: Tensor | None
    branch: Branch | None


class Projected(NamedTuple):
    """Results of `project`.

    Attributes:
        outs: (M, N) for each layer.
        reduced: (M, ΣR), the scaled branch inputs after A, side by side; None without branches. Kept for backward.
        seeds: One per layer: what its dropout was drawn from, None without dropout. Kept for backward.
    """

    outs: list[Tensor]
    reduced: Tensor | None
    seeds: tuple[int | None, ...]


class Gradients(NamedTuple):
    """Results of `project_grad`.

    Attributes:
        dx: (M, K), None where it was not wanted.
        branches: (dA, dB) of each layer that has a branch, float32, in order.
    """

    dx: Tensor | None
    branches: list[tuple[Tensor, Tensor]]


def draw_seeds(layers: Sequence[Projection]) -> tuple[int | None, ...]:
    """A seed from torch's generator for each layer that drops inputs."""
    return tuple(
        int(torch.randint(2**62, ()).item()) if layer.branch and layer.branch.dropout else None
        for layer in layers
    )


def project(
    x: Tensor,
    layers: Sequence[Projection],
    *,
    residual: Tensor | None = None,
    seeds: tuple[int | None, ...] | None = None,
) -> Projected:
    """The outputs of layers that share an input.

    Args:
        x: (M, K), rows contiguous.
        layers: At least one, in one dtype.
        residual: (M, N), added to the output of a single layer before it is rounded.
        seeds: Of an earlier call that is repeated; None draws new ones.
    """
    seeds = draw_seeds(layers) if seeds is None else seeds
    reduced = _reduce(x, layers, seeds)
    products = []
    for layer, slot in zip(layers, _slots(layers), strict=True):
        terms = [Term(x, layer.factor)]
        if layer.branch is not None and reduced is not None:
            terms.append(Term(reduced[:, slot], layer.branch.B.to(x.dtype)))
        products.append(Product(tuple(terms), layer.bias, residual))
    return Projected(linear(products), reduced, seeds)


def project_grad(
    dys: Sequence[Tensor],
    x: Tensor | None,
    reduced: Tensor | None,
    layers: Sequence[Projection],
    seeds: tuple[int | None, ...],
    *,
    need_dx: bool = True,
) -> Gradients:
    """Gradients of `project`.

    Args:
        dys: (M, N) for each layer, rows contiguous.
        x: As in the forward pass; None where no layer has a branch.
        reduced: From the forward pass.
        layers: As in the forward pass.
        seeds: From the forward pass.
        need_dx: Whether the input's gradient is wanted.
    """
    dtype = dys[0].dtype
    adapted = [(dy, layer.branch) for dy, layer in zip(dys, layers, strict=True) if layer.branch]
    terms = [Term(dy, layer.factor) for dy, layer in zip(dys, layers, strict=True)]
    if not adapted:
        return Gradients(linear_grad([Product(tuple(terms))])[0] if need_dx else None, [])
    assert x is not None
    assert reduced is not None
    # s · dy · B, side by side: what flows into the branches' A.
    inner = linear_grad([Product((Term(dy, (b.B * b.scale).to(dtype)),)) for dy, b in adapted])
    drops = [seed for seed, layer in zip(seeds, layers, strict=True) if layer.branch]
    dx = None
    if need_dx:
        kept = [i for i, seed in enumerate(drops) if seed is None]
        if kept:
            stacked = torch.cat([adapted[i][1].A for i in kept]).to(dtype)
            terms.append(Term(_side_by_side([inner[i] for i in kept]), stacked))
        (dx,) = linear_grad([Product(tuple(terms))])
        for (_, branch), g, seed in zip(adapted, inner, drops, strict=True):
            if seed is not None:
                (through,) = linear_grad([Product((Term(g, branch.A.to(dtype)),))])
                dx += _dropped(through, branch.dropout, seed)
    return Gradients(dx, _branch_grads(adapted, inner, x, reduced, drops))


def _branch_grads(
    adapted: Sequence[tuple[Tensor, Branch]],
    inner: Sequence[Tensor],
    x: Tensor,
    reduced: Tensor,
    drops: Sequence[int | None],
) -> list[tuple[Tensor, Tensor]]:
    """dA = (s · dy · B)ᵀ · dropout(x) and dB = dyᵀ · (s · dropout(x) · Aᵀ), all in one call."""
    turned = reduced.T.contiguous()  # (ΣR, M)
    products, begin = [], 0
    for dy, branch in adapted:
        end = begin + branch.A.shape[0]
        products.append(Product((Term(turned[begin:end], dy),)))
        begin = end
    if any(seed is not None for seed in drops):
        for (_, branch), g, seed in zip(adapted, inner, drops, strict=True):
            products.append(Product((Term(g.T.contiguous(), _dropped(x, branch.dropout, seed)),)))
    else:
        products.append(Product((Term(_side_by_side(inner).T.contiguous(), x),)))
    outs = linear_grad(products, torch.float32)
    dBs = [out.T for out in outs[: len(adapted)]]
    dAs = outs[len(adapted) :]
    if len(dAs) != len(adapted):
        dAs = list(torch.split(dAs[0], [branch.A.shape[0] for _, branch in adapted]))
    return list(zip(dAs, dBs, strict=True))


def _reduce(x: Tensor, layers: Sequence[Projection], seeds: Sequence[int | None]) -> Tensor | None:
    """s · dropout(x) · Aᵀ of all branches, side by side (M, ΣR); one product where they share the input."""
    branches = [(layer.branch, seed) for layer, seed in zip(layers, seeds, strict=True) if layer.branch]
    if not branches:
        return None
    if all(seed is None for _, seed in branches):
        stacked = torch.cat([b.A * b.scale for b, _ in branches]).to(x.dtype)
        return linear([Product((Term(x, stacked),))])[0]
    products = [
        Product((Term(_dropped(x, b.dropout, seed), (b.A * b.scale).to(x.dtype)),)) for b, seed in branches
    ]
    return _side_by_side(linear(products))


def _slots(layers: Sequence[Projection]) -> list[slice]:
    """Where each layer's columns stand in `reduced`."""
    slots, begin = [], 0
    for layer in layers:
        end = begin + (layer.branch.A.shape[0] if layer.branch else 0)
        slots.append(slice(begin, end))
        begin = end
    return slots


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _dropped(x: Tensor, probability: float, seed: int | None) -> Tensor:
    """x with inputs zeroed and the rest scaled up; the same seed drops the same."""
    if seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= probability
    return x * kept / (1 - probability)
