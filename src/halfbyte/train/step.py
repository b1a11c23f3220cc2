"""One optimizer step's loss and gradient, weighted by trained tokens over all its micro-batches.

It owns the arithmetic of the loss; it knows nothing of optimizers, epochs, files or displays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from halfbyte.errors import TrainError
from halfbyte.model.heads import PLAIN, Objective, trained_loss
from halfbyte.model.inputs import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.examples import Learnable
    from halfbyte.data.pack import Batch
    from halfbyte.kernels.loss import HeadLoss

ROWS_SHOWN = 8


@dataclass(frozen=True)
class RowNames:
    """How a batch's rows are named to a person: the row's content hash and where it stands.

    Args:
        examples: The rows; ids that are missing are shown bare.
    """

    examples: Iterable[Learnable] = ()

    def of(self, batches: Sequence[Batch]) -> str:
        """Names of all rows of some batches, the first few spelled out."""
        ids = [row_id for batch in batches for row_id in batch.ids]
        named = set(ids[:ROWS_SHOWN])
        where = {
            e.id: e.where for e in self.examples if e.id in named
        }  # looked for only when something is wrong
        shown = [f"{i} ({where[i]})" if i in where else i for i in ids[:ROWS_SHOWN]]
        more = f" and {len(ids) - ROWS_SHOWN} more" if len(ids) > ROWS_SHOWN else ""
        return ", ".join(shown) + more


def batch_loss(
    model: PreTrainedModel, batch: Batch, divisor: float, objective: Objective = PLAIN
) -> HeadLoss:
    """The loss in nats, summed over the batch's trained tokens and divided, in float32.

    Args:
        model: Causal language model.
        batch: Packed or padded documents.
        divisor: Trained tokens of the whole step.
        objective: What is minimised.

    Returns:
        The objective with its gradient, and the plain cross-entropy.
    """
    device = next(model.parameters()).device
    labels = torch.from_numpy(batch.labels).to(device)
    return trained_loss(model, model_inputs(batch, device), labels, divisor=divisor, objective=objective)


def trained_tokens(batches: Sequence[Batch], rows: RowNames) -> int:
    """Number of trained tokens of a whole optimizer step, the divisor of its loss.

    Raises:
        TrainError: HB504 if there are none.
    """
    count = sum(batch.trained_tokens for batch in batches)
    if count == 0:
        raise TrainError(
            "HB504",
            "no token of this step is trained on, so it has no loss",
            where=f"rows {rows.of(batches)}",
            fix="look at the rows as the model sees them: halfbyte data show",
        )
    return count


class Rewards(NamedTuple):
    """What a preference objective says of a micro-batch's pairs, as its share of the step's means.

    Attributes:
        better: Mean reward of the better answers.
        worse: Mean reward of the worse ones.
        accuracy: Share of the pairs in which the better answer has the higher reward.
    """

    better: float
    worse: float
    accuracy: float


class BatchLoss(NamedTuple):
    """A micro-batch's share of the step's loss.

    Attributes:
        loss: Plain cross-entropy in nats per trained token; of a preference objective its own loss per pair.
        objective: What was minimised; the same number where that is `loss`.
        rewards: Of a preference objective; else None.
    """

    loss: float
    objective: float
    rewards: Rewards | None = None

    @classmethod
    def total(cls, shares: Sequence[BatchLoss]) -> BatchLoss:
        """The step's loss."""
        rewards = [share.rewards for share in shares if share.rewards is not None]
        return cls(
            sum(share.loss for share in shares),
            sum(share.objective for share in shares),
            Rewards(*map(sum, zip(*rewards, strict=True))) if rewards else None,
        )


class Share(NamedTuple):
    """A micro-batch's share of the step's loss, before its gradient is taken.

    Attributes:
        objective: Scalar, what is minimised, with its gradient.
        loss: As in `BatchLoss`.
        rewards: As in `BatchLoss`.
    """

    objective: Tensor
    loss: float
    rewards: Rewards | None = None


class StepLoss(Protocol):
    """What a step minimises: a sum over all its micro-batches divided by one number, however it is cut."""

    @property
    def members(self) -> int:
        """Documents that are judged together and therefore lie in one micro-batch, next to each other."""

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """What the whole step's sum is divided by."""

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """A micro-batch's part of the step's loss."""


@dataclass(frozen=True)
class TokenLoss:
    """The loss of every trained token, each counting the same.

    Args:
        objective: What is minimised of each.
    """

    objective: Objective = PLAIN

    @property
    def members(self) -> int:
        """Every document stands alone."""
        return 1

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """Trained tokens."""
        return trained_tokens(batches, rows)

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's trained tokens, divided."""
        found = batch_loss(model, batch, divisor, self.objective)
        return Share(found.objective, found.cross_entropy.item())


def accumulate(
    model: PreTrainedModel, batch: Batch, divisor: int, rows: RowNames, loss: StepLoss | None = None
) -> BatchLoss:
    """Add one micro-batch's share of the step's gradient; no gradient is added if its loss is not finite.

    The step's loss is one sum over all its micro-batches divided once, so that micro-batches of unequal length weigh
    by what they hold and the result does not depend on how the step is cut.

    Args:
        model: Causal language model.
        batch: One micro-batch.
        divisor: Of the whole step, from the same loss.
        rows: How to name the rows in an error.
        loss: What is minimised; plain cross-entropy of tokens if None.

    Returns:
        The batch's share of the step's loss.

    Raises:
        TrainError: HB501 if the loss is not finite.
    """
    found = (loss or TokenLoss()).share(model, batch, divisor)
    value = found.objective.item()
    if not math.isfinite(value):
        raise TrainError(
            "HB501",
            f"the loss is {value}",
            where=f"rows {rows.of([batch])}",
            fix="lower train.learning_rate, or look at these rows with halfbyte data show",
        )
    found.objective.backward()  # type: ignore[no-untyped-call]
    return BatchLoss(found.loss, value, found.rewards)
