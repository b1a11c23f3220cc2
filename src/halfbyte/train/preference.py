"""Preference objectives: answers that are better or worse than others, as losses over their log-probabilities.

It owns the formulas; it must not know models, batches or where a reference comes from.

Shapes: n pairs of answers, or n answers. All tensors are (n,) float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PreferenceSpec:
    """The constants of the formulas.

    Attributes:
        beta: How far the model may leave its reference for a preference: the smaller, the farther. For ORPO the
            weight of the odds ratio beside the cross-entropy.
        margin: SimPO's: by how much the better answer's reward is to lead.
        good_weight: KTO's weight of answers that are good.
        bad_weight: KTO's weight of answers that are not.
    """

    beta: float = 0.1
    margin: float = 0.5
    good_weight: float = 1.0
    bad_weight: float = 1.0


class Answers(NamedTuple):
    """Answers to the same prompts, one for each.

    Attributes:
        logp: Log-probability of the whole answer under the model, with its gradient.
        tokens: Tokens of the answer.
        reference: Log-probability under the model before training.
    """

    logp: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability per token."""
        return self.logp / self.tokens


class Judged(NamedTuple):
    """What an objective makes of some answers.

    Attributes:
        loss: To be made small, with its gradient.
        better: Reward of the better answers, without gradient.
        worse: Reward of the worse ones.
    """

    loss: Tensor
    better: Tensor
    worse: Tensor


def dpo(better: Answers, worse: Answers, spec: PreferenceSpec) -> Judged:
    """Direct preference optimisation: rewards are log-ratios to the reference.

    Source: Rafailov et al., Direct Preference Optimization (2023), equation 7.
    """
    rewards = [spec.beta * (answers.logp - answers.reference) for answers in (better, worse)]
    return Judged(-F.logsigmoid(rewards[0] - rewards[1]), *_detached(rewards))


def simpo(better: Answers, worse: Answers, spec: PreferenceSpec) -> Judged:
    """Simple preference optimisation: rewards are log-probabilities per token, without a reference.

    Source: Meng et al., SimPO (2024), equation 6.
    """
    rewards = [spec.beta * answers.mean for answers in (better, worse)]
    return Judged(-F.logsigmoid(rewards[0] - rewards[1] - spec.margin), *_detached(rewards))


def orpo(better: Answers, worse: Answers, spec: PreferenceSpec) -> Judged:
    """Odds ratio preference optimisation: cross-entropy of the better answer and the odds of it over the worse.

    Source: Hong et al., ORPO (2024), equations 3 to 7.
    """
    log_odds = [answers.mean - _log_complement(answers.mean) for answers in (better, worse)]
    loss = -better.mean - spec.beta * F.logsigmoid(log_odds[0] - log_odds[1])
    return Judged(loss, *_detached([spec.beta * answers.mean for answers in (better, worse)]))


def kto(answers: Answers, good: Tensor, strayed: Tensor, spec: PreferenceSpec) -> Tensor:
    """Kahneman–Tversky optimisation: each answer's reward against how far the model has strayed on the whole.

    Args:
        answers: Answers that were judged one by one.
        good: Whether each was found good, (n,) bool.
        strayed: Scalar ≥ 0 without gradient: mean log-ratio to the reference of answers to other prompts.
        spec: The constants.

    Returns:
        Loss of each answer.

    Source: Ethayarajh et al., KTO (2024), equation 8.
    """
    reward = spec.beta * (answers.logp - answers.reference - strayed)
    gained = 1 - torch.sigmoid(torch.where(good, reward, -reward))
    return torch.where(good, spec.good_weight * gained, spec.bad_weight * gained)


PAIRWISE: dict[str, Callable[[Answers, Answers, PreferenceSpec], Judged]] = {
    "dpo": dpo,
    "simpo": simpo,
    "orpo": orpo,
}
"""Objectives of pairs, by name."""

REFERENCED = ("dpo",)
"""Those of them that compare with the model before training."""


def _log_complement(logp: Tensor) -> Tensor:
    """log(1 - exp(logp)), exact near 0 and far from it."""
    near = logp > -0.6931471805599453
    # The branch that is not taken must not give a gradient of NaN either.
    small, large = torch.where(near, logp, -1.0), torch.where(near, -1.0, logp)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _detached(rewards: list[Tensor]) -> list[Tensor]:
    return [reward.detach() for reward in rewards]
