"""How far activations that are kept in 8 bits move a gradient.

It owns the comparison with the exact gradient of the same batch, and when it is much; it must not know what is kept,
nor who is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.model.blocks import exactly

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MUCH = 0.05
"""Relative error of the whole gradient beyond which a person is warned."""

_FILLING = 0.02  # the size with which transformers begins weights


class Deviation(NamedTuple):
    """What 8 bits change in the gradient of one batch.

    Attributes:
        relative: Length of the difference over that of the exact gradient, all that trains taken as one vector.
        cosine: Of the angle between the two.
        worst: Name of the trained tensor whose own relative error is largest.
        worst_relative: That error.
        layers: How many keep in 8 bits.
    """

    relative: float
    cosine: float
    worst: str
    worst_relative: float
    layers: int

    @property
    def is_much(self) -> bool:
        """Whether the error is beyond `MUCH`, or no number."""
        return not self.relative <= MUCH

    def described(self) -> str:
        """The numbers in a line."""
        return (
            f"gradient with {self.layers} layers in 8 bits: off by {self.relative:.2%}, cosine {self.cosine:.6f}; "
            f"most, {self.worst_relative:.2%}, in {self.worst}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON values; one that is not finite is None."""
        return {
            name: None if isinstance(value, float) and not abs(value) < float("inf") else value
            for name, value in {**self._asdict(), "is_much": self.is_much}.items()
        }


def deviation(model: PreTrainedModel, take: Callable[[], None]) -> Deviation | None:
    """Compare a batch's gradient as the layers keep it with the exact one; weights, gradients and dropout stay.

    Matrices that are all zeros, as LoRA's B is before the first step, are filled with small numbers meanwhile: behind
    zeros half of the gradient is zero, and no error shows.

    Args:
        model: In training mode, without gradients.
        take: Adds the batch's gradient to the parameters.

    Returns:
        None where no layer keeps in 8 bits.
    """
    with exactly(model) as layers:
        if not layers:
            return None
        with _filled(model):
            random = torch.get_rng_state()
            exact = _taken(model, take)
    with _filled(model):
        torch.set_rng_state(random)
        return _compared(exact, _taken(model, take), layers)


def _taken(model: PreTrainedModel, take: Callable[[], None]) -> dict[str, Tensor]:
    take()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _compared(exact: dict[str, Tensor], rounded: dict[str, Tensor], layers: int) -> Deviation:
    off = {name: float((rounded[name] - g).norm()) for name, g in exact.items()}
    long = {name: float(g.norm()) for name, g in exact.items()}
    also_long = sum(float(g.norm()) ** 2 for g in rounded.values()) ** 0.5
    inner = sum(float((rounded[name] * g).sum()) for name, g in exact.items())
    own = {name: off[name] / long[name] for name in exact if long[name] > 0} or {"": 0.0}
    worst = max(own, key=lambda name: (own[name] != own[name], own[name]))
    length = sum(n**2 for n in long.values()) ** 0.5
    whole = sum(n**2 for n in off.values()) ** 0.5
    return Deviation(
        whole / length if length else float("nan"),
        inner / (length * also_long) if length * also_long else float("nan"),
        worst,
        own[worst],
        layers,
    )


@contextmanager
def _filled(model: PreTrainedModel) -> Iterator[None]:
    """Trained tensors that are all zeros hold the same small random numbers within the block."""
    empty = [p for p in model.parameters() if p.requires_grad and not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in empty:
            p.copy_(torch.randn(p.shape, generator=generator) * _FILLING)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in empty:
                p.zero_()
