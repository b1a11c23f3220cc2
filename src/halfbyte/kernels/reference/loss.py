"""The loss of rows of logits and its gradient in plain PyTorch.

It owns the meaning of these operations and is written to be read; it must not be clever.

Shapes: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.loss_terms import Gradient, LossTerms, place_of_gradient


def loss_rows(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    terms: LossTerms,
    gradient: Gradient | None,
) -> tuple[Tensor, Tensor]:
    """The loss of each row; its gradient, if asked for, takes the place of the logits.

    Args:
        logits: (R, V) float32 (or float64), products of hidden states with the head; overwritten.
        targets: (R,) int64, 0 ≤ target < V.
        bias: (V,) in the logits' dtype, added first; or None.
        terms: What is computed.
        gradient: Asks for the gradient for the logits as they were given, computed in their dtype before it is
            rounded; it is left in `place_of_gradient`. None for no gradient.

    Returns:
        Negative log-likelihoods and objectives, (R,) float64 each.

    Source: label smoothing: arXiv 1512.00567, section 7; z-loss: arXiv 2204.02311, section 5; capped logits: Gemma 2,
    arXiv 2408.00118, section 2.
    """
    z = logits * terms.logit_scale if bias is None else (logits + bias) * terms.logit_scale
    if terms.softcap:
        z = terms.softcap * torch.tanh(z / terms.softcap)
    smoothing, rows = terms.label_smoothing, torch.arange(len(z))
    minus_log_p, lse = -torch.log_softmax(z, dim=1), torch.logsumexp(z, dim=1)
    nll = minus_log_p[rows, targets]
    objective = (1 - smoothing) * nll
    if smoothing:
        objective = objective + smoothing * minus_log_p.mean(dim=1)
    if terms.z_loss:
        objective = objective + terms.z_loss * lse.square()
    if gradient is not None:
        slope = (1 + 2 * terms.z_loss * lse)[:, None] * torch.softmax(z, dim=1) - smoothing / z.shape[1]
        slope[rows, targets] -= 1 - smoothing
        if terms.softcap:
            slope = slope * (1 - (z / terms.softcap).square())
        place_of_gradient(logits, gradient.dtype).copy_(slope * (gradient.factor * terms.logit_scale))
    return nll.double(), objective.double()
