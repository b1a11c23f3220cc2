"""Promises of the preference objectives: the papers' formulas, to the digit, with the gradients that follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbyte.train.preference import PAIRWISE, Answers, PreferenceSpec, dpo, kto, orpo, simpo

SPEC = PreferenceSpec(beta=0.3, margin=0.7, good_weight=2.0, bad_weight=0.5)


def answers(logp: list[float], tokens: list[int], reference: list[float]) -> Answers:
    values = (torch.tensor(each, dtype=torch.float64) for each in (logp, tokens, reference))
    return Answers(*values)


BETTER = answers([-3.0, -40.0, -0.5], [4, 9, 1], [-4.0, -38.0, -0.7])
WORSE = answers([-5.0, -30.0, -7.5], [7, 3, 5], [-5.0, -33.0, -7.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_the_logistic_loss_of_the_difference_of_log_ratios() -> None:
    found = dpo(BETTER, WORSE, SPEC)
    better, worse = [0.3 * 1, 0.3 * -2, 0.3 * 0.2], [0.0, 0.3 * 3, 0.3 * -0.5]
    assert found.better.tolist() == pytest.approx(better)
    assert found.worse.tolist() == pytest.approx(worse)
    expected = [-math.log(sigmoid(b - w)) for b, w in zip(better, worse, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected)


def test_an_untrained_model_loses_log_2_in_dpo() -> None:
    same = [a._replace(reference=a.logp) for a in (BETTER, WORSE)]
    assert dpo(*same, SPEC).loss.tolist() == pytest.approx([math.log(2)] * 3)


def test_simpo_compares_means_per_token_beyond_a_margin() -> None:
    found = simpo(BETTER, WORSE, SPEC)
    better = [0.3 * -3 / 4, 0.3 * -40 / 9, 0.3 * -0.5]
    worse = [0.3 * -5 / 7, 0.3 * -10, 0.3 * -1.5]
    expected = [-math.log(sigmoid(b - w - 0.7)) for b, w in zip(better, worse, strict=True)]
    assert found.loss.tolist() == pytest.approx(expected)
    assert (found.better.tolist(), found.worse.tolist()) == (pytest.approx(better), pytest.approx(worse))


def test_orpo_is_cross_entropy_and_the_odds_ratio() -> None:
    found = orpo(BETTER, WORSE, SPEC)
    expected = []
    for b, w in zip((-3 / 4, -40 / 9, -0.5), (-5 / 7, -10.0, -1.5), strict=True):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (b, w)]
        expected.append(-b - 0.3 * math.log(sigmoid(math.log(odds[0] / odds[1]))))
    assert found.loss.tolist() == pytest.approx(expected)


def test_kto_weighs_good_and_bad_and_knows_how_far_the_model_strayed() -> None:
    good = torch.tensor([True, False, True])
    found = kto(BETTER, good, torch.tensor(0.4, dtype=torch.float64), SPEC)
    expected = [
        2.0 * (1 - sigmoid(0.3 * (1 - 0.4))),
        0.5 * (1 - sigmoid(-0.3 * (-2 - 0.4))),
        2.0 * (1 - sigmoid(0.3 * (0.2 - 0.4))),
    ]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradients_make_the_better_answer_likelier_and_the_worse_one_less(name: str) -> None:
    def loss(better: Tensor, worse: Tensor) -> Tensor:
        pair = (BETTER._replace(logp=better), WORSE._replace(logp=worse))
        return PAIRWISE[name](*pair, SPEC).loss

    leaves = tuple(a.logp.clone().requires_grad_() for a in (BETTER, WORSE))
    assert torch.autograd.gradcheck(loss, leaves)
    up, down = torch.autograd.grad(loss(*leaves).sum(), leaves)
    assert (up < 0).all()
    assert (down > 0).all()


@pytest.mark.parametrize("certain", [-1e-12, -1e-300, -800.0])
def test_orpo_is_finite_for_answers_that_are_certain_or_impossible(certain: float) -> None:
    better = answers([certain], [1], [0.0])
    better = better._replace(logp=better.logp.requires_grad_())
    found = orpo(better, WORSE._replace(**{f: getattr(WORSE, f)[:1] for f in WORSE._fields}), SPEC)
    assert found.loss.isfinite().all()
    (gradient,) = torch.autograd.grad(found.loss.sum(), better.logp)
    assert gradient.isfinite().all()
