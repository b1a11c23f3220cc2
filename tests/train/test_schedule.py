"""Promises of the learning-rate schedule, against its closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from halfbyte.settings import TrainConfig
from halfbyte.train.schedule import DECAYS, decay_steps, learning_rate_factor, warmup_steps

# One multiplication, one cosine and one sum in float64: a few units in the last place of numbers up to 1.
FLOAT64_TOLERANCE = 8 * 2.0**-53
LINEAR = TrainConfig(schedule="linear")


@pytest.mark.parametrize("schedule", DECAYS)
def test_warmup_rises_evenly_and_never_is_zero(schedule: str) -> None:
    factors = [learning_rate_factor(step, 20, 4, TrainConfig(schedule=schedule)) for step in range(5)]
    assert factors == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0]


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (20, 4), (101, 13)])
def test_cosine_is_half_a_cosine_after_warmup(total: int, warmup: int) -> None:
    for step in range(warmup, total):
        expected = math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
        got = learning_rate_factor(step, total, warmup, TrainConfig())
        assert abs(got - expected) <= FLOAT64_TOLERANCE
        assert got > 0


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (20, 4), (101, 13)])
def test_linear_falls_by_equal_steps(total: int, warmup: int) -> None:
    for step in range(warmup, total):
        expected = (total - step) / (total - warmup)
        assert abs(learning_rate_factor(step, total, warmup, LINEAR) - expected) <= FLOAT64_TOLERANCE


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate_factor(step, 9, 0, TrainConfig(schedule="constant")) for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("total", "ratio", "expected"), [(100, 0.03, 3), (100, 0.031, 4), (10, 0.0, 0), (1, 0.5, 0), (4, 1.0, 3)]
)
def test_warmup_is_rounded_up_and_leaves_a_step_at_the_peak(total: int, ratio: float, expected: int) -> None:
    assert warmup_steps(total, TrainConfig(warmup_ratio=ratio)) == expected


@pytest.mark.parametrize(
    ("steps", "total", "expected"), [(3, 100, 3), (0, 100, 0), (100, 100, 99), (500, 7, 6)]
)
def test_warmup_steps_beat_the_ratio_and_leave_a_step_at_the_peak(
    steps: int, total: int, expected: int
) -> None:
    assert warmup_steps(total, TrainConfig(warmup_steps=steps, warmup_ratio=0.5)) == expected


def theirs(name: str, total: int, warmup: int, **options: object) -> list[float]:
    """Factors of transformers' scheduler of a name, for each step of a run and the one after it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=options)
    factors = []
    for _ in range(total + 1):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (20, 4), (101, 13)])
@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        ({"schedule": "constant"}, "constant_with_warmup", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "min_lr_ratio": 0.2}, "cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ({"schedule": "wsd"}, "warmup_stable_decay", {}),
        (
            {"schedule": "wsd", "decay_ratio": 0.3, "min_lr_ratio": 0.1},
            "warmup_stable_decay",
            {"min_lr_ratio": 0.1},
        ),
        ({"schedule": "wsd", "decay_ratio": 1.0}, "warmup_stable_decay", {}),
    ],
)
def test_after_warmup_each_schedule_is_that_of_transformers(
    total: int, warmup: int, ours: dict[str, object], name: str, options: dict[str, object]
) -> None:
    config = TrainConfig.model_validate(ours)
    if config.schedule == "wsd":
        options = {**options, "num_decay_steps": decay_steps(total, warmup, config)}
    expected = theirs(name, total, warmup, **options)
    for step in range(warmup, total):
        assert abs(learning_rate_factor(step, total, warmup, config) - expected[step]) <= FLOAT64_TOLERANCE


def test_warmup_is_that_of_transformers_without_its_step_of_zero() -> None:
    expected = theirs("linear", 20, 5)
    for step in range(4):
        got = learning_rate_factor(step, 20, 4, LINEAR)
        assert abs(got - expected[step + 1]) <= FLOAT64_TOLERANCE


def test_wsd_falls_over_its_share_of_the_steps_and_no_more() -> None:
    config = TrainConfig(schedule="wsd", decay_ratio=0.25)
    factors = [learning_rate_factor(step, 20, 2, config) for step in range(20)]
    assert factors[2:16] == [1.0] * 14
    assert all(later < earlier for earlier, later in pairwise(factors[16:]))
    assert [decay_steps(total, 2, TrainConfig(schedule="wsd")) for total in (20, 21, 3)] == [2, 3, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_no_schedule_falls_below_its_lowest(schedule: str) -> None:
    config = TrainConfig.model_validate({"schedule": schedule, "min_lr_ratio": 0.3})
    factors = [learning_rate_factor(step, 1000, 0, config) for step in range(1000)]
    assert min(factors) == factors[-1] > 0.3
    assert factors[-1] < 0.303
