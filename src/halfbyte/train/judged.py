"""The loss of answers that were judged, in pairs or one by one, and the reference they are compared with.

It owns how log-probabilities of documents are had from a batch and handed to a preference objective; it must not know
the objectives' formulas, optimizers or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfbyte.data.pack import UNTRAINED
from halfbyte.model.heads import trained_token_losses
from halfbyte.model.inputs import model_inputs
from halfbyte.model.mode import measured
from halfbyte.train.preference import PAIRWISE, REFERENCED, Answers, PreferenceSpec, kto
from halfbyte.train.step import Rewards, RowNames, Share, trained_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch


@dataclass(frozen=True)
class _Twos:
    """Documents that come in twos: what both losses of judged answers share.

    Args:
        spec: The objective's constants.
        reference: Log-probability of each document's answer before training, by the document's id.
    """

    spec: PreferenceSpec
    reference: Mapping[str, float]

    @property
    def members(self) -> int:
        """Two documents are judged together."""
        return 2

    def divisor(self, batches: Sequence[Batch], rows: RowNames) -> int:
        """Judgements."""
        trained_tokens(batches, rows)
        return sum(len(batch.documents) for batch in batches) // 2

    def _reference(self, batch: Batch, like: Tensor) -> Tensor:
        """Of each document; one that has none is an error, since zero would train on a comparison with nothing."""
        return like.new_tensor([self.reference[i] for i in batch.ids])


@dataclass(frozen=True)
class PairLoss(_Twos):
    """The loss of pairs: every even document of a batch is the better answer, the next one the worse.

    Args:
        spec: The objective's constants.
        reference: As in `_Twos`; not read by objectives without a reference.
        objective: Name of a pairwise objective.
    """

    objective: str

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's pairs, divided."""
        logp, tokens = answer_logps(model, batch)
        compares = self.objective in REFERENCED
        reference = self._reference(batch, logp) if compares else torch.zeros_like(logp)
        better, worse = (Answers(logp[k::2], tokens[k::2], reference[k::2]) for k in (0, 1))
        judged = PAIRWISE[self.objective](better, worse, self.spec)
        objective = judged.loss.sum() / divisor
        rewards = Rewards(
            better=judged.better.sum().item() / divisor,
            worse=judged.worse.sum().item() / divisor,
            accuracy=(judged.better > judged.worse).sum().item() / divisor,
        )
        return Share(objective, objective.item(), rewards)


@dataclass(frozen=True)
class SingleLoss(_Twos):
    """The loss of answers judged one by one (KTO): every even document is an answer to its own prompt, the next one
    an answer to another prompt, by which is seen how far the model has strayed.

    How far is estimated anew for each micro-batch, as the paper does, so that the loss depends on how a step is cut.

    Args:
        spec: The objective's constants.
        reference: As in `_Twos`.
        good: Whether each answer was found good, by its document's id.
    """

    good: Mapping[str, bool]

    def share(self, model: PreTrainedModel, batch: Batch, divisor: int) -> Share:
        """The sum over the batch's answers, divided."""
        judged, others = batch.only(0, 2), batch.only(1, 2)
        with torch.no_grad():
            strayed = answer_logps(model, others)[0]
            strayed = (strayed - self._reference(others, strayed)).mean().clamp(min=0.0)
        logp, tokens = answer_logps(model, judged)
        answers = Answers(logp, tokens, self._reference(judged, logp))
        good = torch.tensor([self.good[i] for i in judged.ids], device=logp.device)
        objective = kto(answers, good, strayed, self.spec).sum() / divisor
        rewards = self.spec.beta * (logp.detach() - answers.reference)
        return Share(objective, objective.item(), _rewards(rewards, good, divisor))


def _rewards(rewards: Tensor, good: Tensor, divisor: int) -> Rewards:
    """Sums over the good and the bad answers by the number of all; right are good ones above 0 and bad ones below."""
    zero = torch.zeros_like(rewards)
    return Rewards(
        better=torch.where(good, rewards, zero).sum().item() / divisor,
        worse=torch.where(good, zero, rewards).sum().item() / divisor,
        accuracy=((rewards > 0) == good).sum().item() / divisor,
    )


def answer_logps(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each document's trained tokens, with its gradient, and how many these are.

    Args:
        model: Causal language model.
        batch: Packed or padded documents.

    Returns:
        Log-probabilities in nats and counts, both (n,) float64, n documents.
    """
    device = next(model.parameters()).device
    labels = torch.from_numpy(batch.labels).to(device)
    nll = trained_token_losses(model, model_inputs(batch, device), labels)  # (P,)
    owner = np.empty(batch.labels.shape, np.int64)  # (B, T)
    for number, (row, begin, end) in enumerate(batch.documents.tolist()):
        owner[row, begin:end] = number
    of = torch.from_numpy(owner[:, 1:][batch.labels[:, 1:] != UNTRAINED]).to(device)  # (P,)
    zeros = nll.new_zeros(len(batch.documents), dtype=torch.float64)
    tokens = torch.bincount(of, minlength=len(batch.documents)).double()
    return zeros.index_add(0, of, -nll.double()), tokens


def reference_logps(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Log-probability of each document's answer under a model as it stands, by the document's id.

    Taken before the first step, with an adapter that changes nothing yet, the model is its own reference: no second
    copy is held and nothing is computed twice in later epochs.

    Args:
        model: Causal language model; left as it was found.
        batches: The documents.
    """
    found: dict[str, float] = {}
    with measured(model):
        for batch in batches:
            found.update(zip(batch.ids, answer_logps(model, batch)[0].tolist(), strict=True))
    return found
