"""What the loss of a row of logits is made of, and where its gradient is written.

It owns these two agreements between an operation and its backends; it must not compute a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossTerms(NamedTuple):
    """From a head's products x to a loss: logits z = softcap · tanh(logit_scale · x / softcap), then

    (1 - label_smoothing) · nll + label_smoothing · (mean of -log p over the vocabulary) + z_loss · lse².

    Attributes:
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 ≤ label_smoothing < 1.
        z_loss: Weight of the squared log-sum-exp, ≥ 0.
        softcap: Largest magnitude of a logit, > 0; 0 for no cap, z = logit_scale · x.
        logit_scale: Factor of the products, not 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0


class Gradient(NamedTuple):
    """A wish for a gradient.

    Attributes:
        dtype: What it is rounded to, once.
        factor: It is that of factor · objective.
    """

    dtype: torch.dtype
    factor: float


def place_of_gradient(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory that the gradient for rows of logits takes: the front of each row, so that it needs no other.

    Args:
        logits: (R, V) contiguous, in a dtype at least as wide.
        dtype: Of the gradient.

    Returns:
        (R, V) in `dtype`, a view of `logits`.
    """
    return logits.view(dtype)[:, : logits.shape[1]]
