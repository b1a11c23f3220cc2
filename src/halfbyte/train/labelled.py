"""The loss of classes: of whole documents, or of their tokens.

It owns the cross-entropy of a batch's labels and what it is divided by; it must not know rows, names or metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.data.pack import UNTRAINED
from halfbyte.model.encoders import document_logits, token_logits
from halfbyte.model.heads import PLAIN, Objective
from halfbyte.train.step import RowNames, Share, TokenLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch


@dataclass(frozen=True)
class LabelLoss:
    """The loss of documents that have a class each, each counting the same.

    Args:
        labels: Number of each document's class, by the document's id.
        objective: What is minimised of each.
    """

    labels: Mapping[str, int]
    objective: Objective = PLAIN

    @property
    def members(self) -> int:
        """Every document stands alone."""
        return 1

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """Documents."""
        return sum(len(batch.documents) for batch in batches)

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's documents, divided."""
        logits = document_logits(model, batch)  # (n, C)
        targets = torch.tensor([self.labels[i] for i in batch.ids], device=logits.device)
        return summed(logits, targets, divisor, self.objective)


@dataclass(frozen=True)
class TagLoss(TokenLoss):
    """The loss of tokens that have a class each, each counting the same; what is trained is a token's class."""

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's tokens, divided."""
        targets = torch.from_numpy(batch.labels).to(model.device)  # (B, T)
        chosen = targets != UNTRAINED
        return summed(token_logits(model, batch)[chosen], targets[chosen], divisor, self.objective)


def summed(logits: Tensor, targets: Tensor, divisor: int, objective: Objective) -> Share:
    """Cross-entropy in nats, summed and divided.

    Args:
        logits: (n, C) float32.
        targets: (n,) int64.
        divisor: Of the whole step.
        objective: Label smoothing, and the weight of the squared log-sum-exp.
    """
    plain = F.cross_entropy(logits, targets, reduction="sum") / divisor
    if objective == PLAIN:
        return Share(plain, plain.item())
    smooth = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=objective.label_smoothing)
    spread = objective.z_loss * torch.logsumexp(logits, dim=1).square().sum()
    return Share((smooth + spread) / divisor, plain.item())
