"""How LoRA's two matrices begin: one function for each way, and what the base holds from then on.

It owns the arithmetic of beginnings; it must not know modules, files or where a weight comes from.

With W the original weight, Q what the base holds and s the scale of the branch, every beginning has
W ≈ Q + s · B · A. Shapes: N out features, K in features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.kernels import ops
from halfbyte.model.lora_spec import Init, LoraSpec
from halfbyte.quant.weight import QuantSpec


class Pair(NamedTuple):
    """Two matrices of a branch.

    Attributes:
        A: (R, K) float32.
        B: (N, R) float32.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Site:
    """What an initialisation is given.

    Attributes:
        shape: N and K.
        spec: Rank, scale and iterations of this layer.
        generator: Source of random values.
        weight: Makes the original weight (N, K) in float32; not called by those that need none.
        quantization: How the base holds its weight in 4 bits; None for a dense base.
    """

    shape: tuple[int, int]
    spec: LoraSpec
    generator: torch.Generator
    weight: Callable[[], Tensor]
    quantization: QuantSpec | None


class Start(NamedTuple):
    """How a layer begins.

    Attributes:
        matrices: A and B.
        taken: What was taken from the weight before the base held it; None where the base stays as it is.
        weight: (N, K) float32 that the base is to hold; None where it stays as it is.
    """

    matrices: Pair
    taken: Pair | None = None
    weight: Tensor | None = None


def default(site: Site) -> Start:
    """A uniform as in torch's linear layers, B zero: the layer begins as its base."""
    (N, K), r = site.shape, site.spec.r
    A = torch.empty(r, K)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=site.generator)
    return Start(Pair(A, torch.zeros(N, r)))


def gaussian(site: Site) -> Start:
    """A normal with deviation 1 / R, B zero: the layer begins as its base."""
    (N, K), r = site.shape, site.spec.r
    A = torch.empty(r, K).normal_(std=1 / r, generator=site.generator)
    return Start(Pair(A, torch.zeros(N, r)))


def pissa(site: Site) -> Start:
    """The principal singular vectors of W; the base holds what is left.

    On a 4-bit base every further iteration decomposes W less what the base holds, so that the branch takes up
    what quantising loses. A dense base loses next to nothing, and one iteration is all there is.

    Source: PiSSA (arXiv 2404.02948), sections 3 and 4, and algorithm 1.
    """
    W, scale = site.weight(), site.spec.scale
    pair = _principal(W, site.spec)
    for _ in range(site.spec.init_iterations - 1 if site.quantization else 0):
        pair = _principal(W - _held(residual(W, pair, scale), site.quantization), site.spec)
    return Start(pair, pair, residual(W, pair, scale))


def loftq(site: Site) -> Start:
    """By turns: quantise W less the branch, then decompose what quantising lost.

    A dense base holds the values of NF4 afterwards, as in PEFT.

    Source: LoftQ (arXiv 2310.08659), algorithm 1.
    """
    W, scale = site.weight(), site.spec.scale
    (N, K), r = site.shape, site.spec.r
    quantization = site.quantization or QuantSpec(double_quant=False)
    pair = taken = Pair(torch.zeros(r, K), torch.zeros(N, r))
    held = W
    for _ in range(site.spec.init_iterations):
        taken = pair
        held = _held(residual(W, taken, scale), quantization)
        pair = _principal(W - held, site.spec)
    return Start(pair, taken, residual(W, taken, scale) if site.quantization else held)


INITS: dict[Init, Callable[[Site], Start]] = {
    "default": default,
    "gaussian": gaussian,
    "pissa": pissa,
    "loftq": loftq,
}
"""Every way to begin, by the name of the setting."""


def residual(W: Tensor, taken: Pair, scale: float) -> Tensor:
    """W less s · B · A, (N, K)."""
    return W - scale * taken.B @ taken.A


def _held(W: Tensor, quantization: QuantSpec | None) -> Tensor:
    """The values that a base in 4 bits holds of a weight."""
    return ops.dequantize_4bit(ops.quantize_4bit(W, quantization), torch.float32)


def _principal(W: Tensor, spec: LoraSpec) -> Pair:
    """The pair of rank R for which s · B · A is nearest to W, each matrix with half of the singular values."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[: spec.r] / spec.scale).sqrt().diag()
    return Pair(root @ Vh[: spec.r], U[:, : spec.r] @ root)
