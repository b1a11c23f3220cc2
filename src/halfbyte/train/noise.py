"""How much a step's gradient owes to which rows it happened to get, from the norms of its micro-batches' gradients.

It owns that measurement, one step at a time; it must not know steps before, or what is advised.

A step's gradient is the mean of its micro-batches' gradients g_m with weights w_m, their shares of what the loss is
divided by. Each g_m has the true gradient G as its mean and a variance that falls with its size, so that with k
micro-batches the sum of w_m |g_m|^2 is |G|^2 + k V on average, and |sum of w_m g_m|^2 is |G|^2 + V. V = tr(S)/B is
the variance of the whole step's gradient. Both are solved for; the simple noise scale is B V / |G|^2.

Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.1.
"""

from __future__ import annotations

from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


class Noise(NamedTuple):
    """What one step's gradient is made of; estimates without bias, which may be negative in a single step.

    Attributes:
        grad_variance: V, the variance of the step's gradient over which rows it gets, summed over all parameters.
        grad_signal: |G|^2, the squared norm of the gradient that infinitely many rows would have.
    """

    grad_variance: float
    grad_signal: float


class NoiseMeter:
    """Takes the norm of each micro-batch's gradient as it comes, before it is added to those before it.

    Nothing is copied and no pass is added: each gradient is read once more, in full training too. Only steps of at
    least two micro-batches are measured.

    Args:
        parameters: Those that are trained.
        micro_batches: Of a step; with one nothing is done at all.
    """

    def __init__(self, parameters: Collection[torch.nn.Parameter], micro_batches: int) -> None:
        self._parameters = parameters if micro_batches > 1 else ()
        self._hooks: list[RemovableHandle] = []
        self._norms: list[Tensor] = []
        self._weighted: list[float] = []

    def __enter__(self) -> NoiseMeter:
        self._hooks = [
            parameter.register_hook(self._see)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def begin(self) -> None:
        """Forget the gradients before a step."""
        self._norms, self._weighted = [], []

    def passed(self, share: float) -> None:
        """Note a micro-batch whose gradient is complete.

        Args:
            share: Its part of what the step's loss is divided by; without one it adds nothing.
        """
        if self._norms and share > 0:
            squared = torch.stack(self._norms).double().square().sum().item()
            self._weighted.append(squared / share)  # share times |gradient / share|^2
        self._norms = []

    def of_step(self, norm: float) -> Noise | None:
        """What the finished step shows.

        Args:
            norm: Of its whole gradient, before clipping.

        Returns:
            None for a step of fewer than two micro-batches.
        """
        micro_batches = len(self._weighted)
        if micro_batches < 2:
            return None
        parts, whole = sum(self._weighted), norm**2
        return Noise(
            (parts - whole) / (micro_batches - 1), (micro_batches * whole - parts) / (micro_batches - 1)
        )
