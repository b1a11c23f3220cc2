"""Promises of the intervals: they cover what they say, agree with closed forms, claim no false certainty."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest

from halfbyte.errors import EvaluateError
from halfbyte.evaluate.statistics import (
    Interval,
    Score,
    bootstrap_mean,
    bootstrap_ratio,
    paired_difference,
    proportion,
)

REPETITIONS = 600
# Three standard errors of a proportion of 95 % seen over REPETITIONS trials: a sound interval falls below by
# chance in one of a thousand seeds, and these seeds are fixed.
COVERED_AT_LEAST = 0.95 - 3.0 * math.sqrt(0.95 * 0.05 / REPETITIONS)
assert COVERED_AT_LEAST > 0.92


def coverage(intervals: list[Interval], truth: float) -> float:
    return sum(each.low <= truth <= each.high for each in intervals) / len(intervals)


def scores(values: list[float]) -> list[Score]:
    return [Score(f"item{i}", value) for i, value in enumerate(values)]


def test_mean_interval_covers_the_truth_of_skewed_data() -> None:
    rng = np.random.default_rng(1)
    draws = [rng.exponential(2.0, 80) for _ in range(REPETITIONS)]
    found = [bootstrap_mean(each, resamples=1000, seed=i) for i, each in enumerate(draws)]
    assert coverage(found, 2.0) >= COVERED_AT_LEAST
    too_narrow = [Interval(i.value, *((i.value + e) / 2 for e in (i.low, i.high)), "", 80) for i in found]
    assert coverage(too_narrow, 2.0) < COVERED_AT_LEAST, "the check must be able to fail"


def test_mean_interval_of_few_items_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    draws = [rng.normal(-1.0, 3.0, 10) for _ in range(REPETITIONS)]
    assert coverage([bootstrap_mean(each, resamples=1000) for each in draws], -1.0) >= COVERED_AT_LEAST


def test_ratio_interval_covers_the_truth_where_long_items_are_harder() -> None:
    rng = np.random.default_rng(3)
    found = []
    for i in range(REPETITIONS):
        tokens = rng.integers(5, 100, 100)
        per_token = rng.gamma(4.0, (1.0 + tokens / 100.0) / 4.0)  # mean 1 + tokens/100
        found.append(bootstrap_ratio(per_token * tokens, tokens, resamples=1000, seed=i))
    sizes = np.arange(5, 100)
    truth = float((sizes * (1.0 + sizes / 100.0)).sum() / sizes.sum())
    assert coverage(found, truth) >= COVERED_AT_LEAST


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_proportion_interval_covers_at_least_what_it_says(p: float) -> None:
    n = 30
    binomial = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = sum(
        weight for k, weight in enumerate(binomial) if (each := proportion(k, n)).low <= p <= each.high
    )
    assert covered >= 0.95


def test_paired_difference_of_answers_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    found = []
    for _ in range(REPETITIONS):
        u = rng.random(60)  # 15 % become right, 5 % become wrong, the rest stay
        before = np.where(u < 0.15, 0, np.where(u < 0.2, 1, u < 0.6))
        after = np.where(u < 0.15, 1, np.where(u < 0.2, 0, u < 0.6))
        found.append(paired_difference(scores(list(before)), scores(list(after))))
    assert found[0].method == "Tango score"
    assert coverage(found, 0.1) >= COVERED_AT_LEAST


# Resampling error of a 2.5 % quantile at R resamples is sqrt(p(1-p)/R) / density(z) = 0.027 standard errors at
# R = 10,000; four times that, and a tenth for the skewness of a mean of 400 uniform values.
BOOTSTRAP_TOLERANCE_SE = 0.12


def test_mean_interval_agrees_with_the_normal_one_where_that_is_right() -> None:
    x = np.random.default_rng(5).uniform(0.0, 1.0, 400)
    found = bootstrap_mean(x)
    error = x.std(ddof=1) / math.sqrt(x.size)
    z = NormalDist().inv_cdf(0.975)
    assert found.value == pytest.approx(x.mean(), abs=1e-12)
    assert found.low == pytest.approx(x.mean() - z * error, abs=BOOTSTRAP_TOLERANCE_SE * error)
    assert found.high == pytest.approx(x.mean() + z * error, abs=BOOTSTRAP_TOLERANCE_SE * error)


# What Hall's expansion leaves out is of order z³ · skewness² / n, 0.24 here, times a coefficient below a fifth.
SKEWED_TOLERANCE_SE = 0.045


def test_interval_of_a_skewed_mean_leans_as_far_as_theory_says() -> None:
    # Hall, "Theoretical comparison of bootstrap confidence intervals" (1988): without the corrections for bias and
    # skewness the ends lie 0.17 standard errors too low, without that for bias alone 0.06.
    n = 100
    x = -np.log1p(-(np.arange(n) + 0.5) / n)  # exponential quantiles
    skewness = ((x - x.mean()) ** 3).mean() / x.std() ** 3
    error, z = x.std() / math.sqrt(n), 1.9842 * math.sqrt(n / (n - 1))  # Student's t of 99 degrees of freedom
    found = bootstrap_mean(x, resamples=100_000)
    for end, at in ((found.low, -z), (found.high, z)):
        theory = at + skewness / (6.0 * math.sqrt(n)) * (2.0 * at * at + 1.0)
        assert (end - x.mean()) / error == pytest.approx(theory, abs=SKEWED_TOLERANCE_SE)


def test_ratio_is_weighted_by_counts_not_by_items() -> None:
    found = bootstrap_ratio([10.0, 1.0, 1.0], [10, 1, 4], resamples=100)
    assert found.value == pytest.approx(12.0 / 15.0)
    assert found.n == 3


@pytest.mark.parametrize("n", [1, 7, 40, 1000])
def test_proportion_has_the_closed_form_where_none_or_all_succeed(n: int) -> None:
    none, everything = proportion(0, n), proportion(n, n)
    high = 1.0 - 0.025 ** (1.0 / n)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(high, rel=1e-9)
    assert (everything.value, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(1.0 - high, rel=1e-9)


def test_proportion_agrees_with_published_tables() -> None:
    found = proportion(7, 20)
    assert (found.low, found.high) == (pytest.approx(0.1539, abs=5e-5), pytest.approx(0.5922, abs=5e-5))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_equal_answers_are_never_given_a_width_of_zero(value: float) -> None:
    found = bootstrap_mean([value] * 25)
    assert found.value == value
    assert found.high - found.low > 0.1
    assert found.method == "exact binomial"


def test_no_changed_answer_is_not_taken_as_proof_of_no_change() -> None:
    same = scores([1.0, 0.0] * 50)
    found = paired_difference(same, same)
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert found.value == 0.0
    assert found.high == pytest.approx(z2 / (100 + z2), rel=1e-9)  # Tango's closed form without changes
    assert found.low == pytest.approx(-found.high, rel=1e-9)


def score_by_search(won: int, lost: int, n: int, d: float) -> float:
    """Score of the hypothesis that P(won) - P(lost) = d, with the likeliest P(lost) found on a fine grid."""
    q = np.linspace(max(0.0, -d), (1.0 - d) / 2.0, 400_001)[1:-1]
    likelihood = won * np.log(q + d) + lost * np.log(q) + (n - won - lost) * np.log(1.0 - 2.0 * q - d)
    best = float(q[likelihood.argmax()])
    return (won - lost - n * d) / math.sqrt(n * (2.0 * best + d - d * d))


@pytest.mark.parametrize(("won", "lost", "n"), [(0, 1, 44), (5, 2, 30), (12, 3, 40), (1, 9, 200)])
def test_ends_for_paired_answers_are_where_the_score_test_just_rejects(won: int, lost: int, n: int) -> None:
    before = scores([0.0] * won + [1.0] * lost + [1.0] * (n - won - lost))
    after = scores([1.0] * won + [0.0] * lost + [1.0] * (n - won - lost))
    found = paired_difference(before, after)
    z = NormalDist().inv_cdf(0.975)
    assert found.value == pytest.approx((won - lost) / n)
    # The grid leaves P(lost) uncertain by 1.3e-6 of at least 1e-2: the score by half of that, relatively.
    assert score_by_search(won, lost, n, found.low) == pytest.approx(z, rel=1e-3)
    assert score_by_search(won, lost, n, found.high) == pytest.approx(-z, rel=1e-3)


@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0)])
def test_paired_answers_that_all_change_reach_the_end_of_the_range(before: float, after: float) -> None:
    found = paired_difference(scores([before] * 20), scores([after] * 20))
    assert found.value == after - before
    assert max(abs(found.low), abs(found.high)) == 1.0
    assert 0.5 < min(abs(found.low), abs(found.high)) < 1.0


def test_swapping_the_sides_mirrors_the_difference() -> None:
    rng = np.random.default_rng(6)
    a, b = scores(list(rng.integers(0, 2, 50) * 1.0)), scores(list(rng.integers(0, 2, 50) * 1.0))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low), abs=1e-9)


def test_pairing_sees_a_difference_that_two_intervals_side_by_side_do_not() -> None:
    rng = np.random.default_rng(7)
    hardness = rng.gamma(2.0, 1.0, 100)
    before = [Score(str(i), h * 20.0, 20) for i, h in enumerate(hardness)]
    after = [Score(s.id, s.total - 20 * rng.normal(0.05, 0.05), s.count) for s in before]
    difference = paired_difference(before, list(reversed(after)))
    assert difference.high < 0.0
    assert difference.value == pytest.approx(-0.05, abs=0.02)
    first, second = (bootstrap_ratio([s.total for s in x], [s.count for s in x]) for x in (before, after))
    assert first.low < second.high


def test_missing_added_and_recounted_items_are_refused_by_name() -> None:
    before = [Score("both", 1.0, 3), Score("gone", 1.0, 2), Score("cut", 4.0, 9)]
    after = [Score("both", 1.0, 3), Score("new", 1.0, 2), Score("cut", 4.0, 8)]
    with pytest.raises(EvaluateError, match="HB602") as caught:
        paired_difference(before, after)
    for part in ("gone only before", "new only after", "cut counts 9 before, 8 after", "3 items"):
        assert part in str(caught.value)


def test_items_that_appear_twice_are_refused() -> None:
    with pytest.raises(EvaluateError, match="HB602") as caught:
        paired_difference(scores([1.0]) * 2, scores([1.0]))
    assert "item0" in str(caught.value)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], [[1.0], [2.0]]])
def test_numbers_that_are_none_or_not_finite_are_refused(bad: list[float]) -> None:
    with pytest.raises(EvaluateError, match="HB601"):
        bootstrap_mean(bad)


@pytest.mark.parametrize(
    ("totals", "counts"), [([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, 0.0]), ([1.0, 2.0], [1.0, math.nan])]
)
def test_counts_that_do_not_fit_are_refused(totals: list[float], counts: list[float]) -> None:
    with pytest.raises(EvaluateError, match="HB601"):
        bootstrap_ratio(totals, counts)


def test_settings_out_of_range_are_refused() -> None:
    for call in (
        lambda: bootstrap_mean([1.0, 3.0], resamples=99),
        lambda: bootstrap_mean([1.0, 3.0], level=1.0),
        lambda: proportion(1, 3, level=0.0),
        lambda: proportion(4, 3),
        lambda: proportion(0, 0),
    ):
        with pytest.raises(EvaluateError, match="HB601"):
            call()


def test_one_item_says_nothing_about_the_spread() -> None:
    found = bootstrap_ratio([3.0], [2.0])
    assert (found.value, found.low, found.high) == (1.5, -math.inf, math.inf)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["low"] is None
    assert found.map(math.exp).low == 0.0


def test_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    x = np.random.default_rng(8).gamma(2.0, 1.0, 50)
    assert bootstrap_mean(x, seed=3) == bootstrap_mean(x, seed=3)
    assert bootstrap_mean(x, seed=3) != bootstrap_mean(x, seed=0)


def test_items_keep_their_interval_whatever_unit_they_are_in() -> None:
    rng = np.random.default_rng(9)
    totals, counts = rng.gamma(2.0, 1.0, 37), rng.integers(1, 9, 37)
    nats, bits = (bootstrap_ratio(totals / unit, counts, resamples=500) for unit in (1.0, math.log(2.0)))
    assert nats.map(lambda x: x / math.log(2.0)).low == pytest.approx(bits.low, rel=1e-12)


def test_ten_thousand_resamples_of_five_thousand_items_are_quick_and_small() -> None:
    rng = np.random.default_rng(10)
    totals, counts = rng.gamma(2.0, 50.0, 5000), rng.integers(1, 200, 5000)
    begin = time.process_time()
    bootstrap_ratio(totals, counts)
    assert time.process_time() - begin < 2.0
    tracemalloc.start()
    bootstrap_ratio(totals, counts, resamples=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20  # draws and what they pick: 2^19 x (8 + 8) bytes and the sums; below 3 times that
