"""What each layer keeps for its backward pass, chosen so that a stated memory suffices.

It owns the exact byte counts and the choice; it must not know modules, or how a layer computes.

In the backward pass layers are left from the last to the first, so the memory of the later ones is free again when an
earlier one is computed a second time: what can be kept is kept at the end of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.kernels.terms import sizes
from halfbyte.model.layer import Keep, Layer, Norm
from halfbyte.model.projection import Projection

STATISTIC_BYTES = 4  # norms' statistics and attention's log-sum-exp are float32


@dataclass(frozen=True)
class KeepPlan:
    """What every layer keeps, and what that takes.

    Attributes:
        keeps: One per layer, in the model's order.
        peak_bytes: Most that the layers hold at once, a layer that is computed again included.
        budget_bytes: What they may hold.
    """

    keeps: tuple[Keep, ...]
    peak_bytes: int
    budget_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the budget is kept; where not, everything is computed again and still takes more."""
        return self.peak_bytes <= self.budget_bytes

    def as_dict(self) -> dict[str, Any]:
        """The choice as JSON values."""
        return {
            "keeps": [keep.name.lower() for keep in self.keeps],
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
        }

    def described(self) -> str:
        """The choice in a few words."""
        names = {Keep.ALL: "keep all", Keep.COSTLY: "keep products", Keep.INPUT: "are computed again"}
        parts = [f"{self.keeps.count(keep)} {name}" for keep, name in names.items() if keep in self.keeps]
        of = f"{self.peak_bytes / 1e9:.2f} of {self.budget_bytes / 1e9:.2f} GB"
        return f"layers: {', '.join(parts)}; {of if self.fits else of + ', more than there is'}"


def kept_bytes(layer: Layer, tokens: int, itemsize: int, keep: Keep) -> int:
    """Bytes that a layer holds between forward and backward, its input included.

    Args:
        layer: Its parts.
        tokens: B·T.
        itemsize: Bytes of an activation.
        keep: What it keeps.
    """
    C, heads = _width(layer.attention_norm), layer.heads
    q, kv = heads.count * heads.size, heads.kv_count * heads.size
    numbers = C + _rank(layer.down)
    statistics = 0
    if layer.after_mlp is not None:
        numbers += C
        statistics += _statistics(layer.after_mlp)
    if keep is Keep.INPUT:
        return tokens * (numbers * itemsize + statistics * STATISTIC_BYTES)
    numbers += q + 2 * kv + q + C + sum(_outer(p) for p in layer.up)
    numbers += sum(_rank(p) for p in (*layer.qkv, layer.out, *layer.up))
    statistics += _statistics(layer.attention_norm) + _statistics(layer.mlp_norm) + heads.count
    if layer.after_attention is not None:
        numbers += C
        statistics += _statistics(layer.after_attention)
    for norm, width, count in ((heads.q_norm, q, heads.count), (heads.k_norm, kv, heads.kv_count)):
        if norm is not None:
            numbers += width
            statistics += count * _statistics(norm)
    if keep is Keep.ALL:
        numbers += 2 * C + sizes(layer.down.factor)[1]
    return tokens * (numbers * itemsize + statistics * STATISTIC_BYTES)


def plan_keeps(layers: Sequence[Layer], tokens: int, itemsize: int, budget_bytes: int) -> KeepPlan:
    """The choice that computes least again within a budget.

    Args:
        layers: In the model's order.
        tokens: Most tokens of a pass, B·T.
        itemsize: Bytes of an activation.
        budget_bytes: What the layers may hold.
    """
    held = [{keep: kept_bytes(layer, tokens, itemsize, keep) for keep in Keep} for layer in layers]
    keeps = [Keep.INPUT] * len(layers)
    for better in (Keep.COSTLY, Keep.ALL):
        for i in reversed(range(len(layers))):
            worse, keeps[i] = keeps[i], better
            if _peak(held, keeps) > budget_bytes:
                keeps[i] = worse
                break
    return KeepPlan(tuple(keeps), _peak(held, keeps), budget_bytes)


def _peak(held: Sequence[dict[Keep, int]], keeps: Sequence[Keep]) -> int:
    """Most that is held at once: when a layer's backward begins it has everything, and the ones before wait."""
    before = peak = 0
    for each, keep in zip(held, keeps, strict=True):
        peak = max(peak, before + each[Keep.ALL])
        before += each[keep]
    return peak


def _width(norm: Norm) -> int:
    return norm.weight.numel()


def _outer(projection: Projection) -> int:
    return sizes(projection.factor)[0]


def _rank(projection: Projection) -> int:
    return projection.branch.A.shape[0] if projection.branch else 0


def _statistics(norm: Norm) -> int:
    """Statistics per normalised row."""
    return 2 if norm.kind == "layer" else 1
