"""The loss of texts that are alike: the partner found among all texts of a pass, or a cosine brought to a score.

It owns both losses over vectors of documents; it must not know rows, how vectors are pooled or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.train.step import RowNames, Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch

Vectors = Callable[["PreTrainedModel", "Batch"], Tensor]
"""Takes model and batch, gives a vector of length 1 for each document, (n, H) float32."""

TEMPERATURE = 0.05
"""What cosines are divided by: sentence-transformers' scale of 20."""


@dataclass(frozen=True)
class PartnerLoss:
    """To find each anchor's partner among the partners of all anchors of a pass, and their negatives.

    Other anchors' partners are negatives that cost nothing, so the loss depends on which rows come into a pass
    together, and more rows in a pass are a harder and better lesson. A text equal to the partner or the anchor is no
    negative.

    Args:
        vectors: Vectors of documents.
        members: 2 for an anchor with its partner, 3 with a negative behind.

    Source: Henderson et al., "Efficient natural language response suggestion" (2017), section 4.4.
    """

    vectors: Vectors
    members: int = 2

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """Anchors."""
        return sum(len(batch.documents) for batch in batches) // self.members

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's anchors, divided."""
        vectors, each = self.vectors(model, batch), self.members
        anchors = vectors[0::each]  # (n, H)
        others = torch.cat([vectors[k::each] for k in range(1, each)])  # ((each - 1) n, H)
        names = [name for k in range(1, each) for name in batch.ids[k::each]]
        own = batch.ids[1::each]
        equal = torch.tensor(
            [
                [at != n and name in (own[n], anchor) for at, name in enumerate(names)]
                for n, anchor in enumerate(batch.ids[0::each])
            ],
            device=vectors.device,
        )
        scores = (anchors @ others.T / TEMPERATURE).masked_fill(equal, -torch.inf)
        target = torch.arange(len(anchors), device=vectors.device)
        loss = F.cross_entropy(scores, target, reduction="sum") / divisor
        return Share(loss, loss.item())


@dataclass(frozen=True)
class CosineLoss:
    """To bring the cosine of two texts to the score of the pair: mean squared difference.

    Args:
        vectors: Vectors of documents.
        scores: Score of each pair, by the ids of its two documents.
    """

    vectors: Vectors
    scores: Mapping[tuple[str, str], float]

    @property
    def members(self) -> int:
        """Two texts are compared."""
        return 2

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """Pairs."""
        return sum(len(batch.documents) for batch in batches) // 2

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's pairs, divided."""
        vectors = self.vectors(model, batch)
        wanted = [self.scores[pair] for pair in zip(batch.ids[0::2], batch.ids[1::2], strict=True)]
        cosines = (vectors[0::2] * vectors[1::2]).sum(1)
        loss = (cosines - cosines.new_tensor(wanted)).square().sum() / divisor
        return Share(loss, loss.item())
