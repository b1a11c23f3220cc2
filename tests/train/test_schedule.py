"""Promises of the learning-rate schedule, against its closed form."""

from __future__ import annotations

import math

import pytest

from halfbyte.train.schedule import DECAYS, learning_rate_factor, warmup_steps

# One multiplication, one cosine and one sum in float64: a few units in the last place of numbers up to 1.
FLOAT64_TOLERANCE = 8 * 2.0**-53


@pytest.mark.parametrize("schedule", DECAYS)
def test_warmup_rises_evenly_and_never_is_zero(schedule: str) -> None:
    factors = [learning_rate_factor(step, 20, 4, schedule) for step in range(5)]
    assert factors == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0]


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (20, 4), (101, 13)])
def test_cosine_is_half_a_cosine_after_warmup(total: int, warmup: int) -> None:
    for step in range(warmup, total):
        expected = math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
        got = learning_rate_factor(step, total, warmup, "cosine")
        assert abs(got - expected) <= FLOAT64_TOLERANCE
        assert got > 0


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 0), (20, 4), (101, 13)])
def test_linear_falls_by_equal_steps(total: int, warmup: int) -> None:
    for step in range(warmup, total):
        expected = (total - step) / (total - warmup)
        assert abs(learning_rate_factor(step, total, warmup, "linear") - expected) <= FLOAT64_TOLERANCE


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate_factor(step, 9, 0, "constant") for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("total", "ratio", "expected"), [(100, 0.03, 3), (100, 0.031, 4), (10, 0.0, 0), (1, 0.5, 0), (4, 1.0, 3)]
)
def test_warmup_is_rounded_up_and_leaves_a_step_at_the_peak(total: int, ratio: float, expected: int) -> None:
    assert warmup_steps(total, ratio) == expected
