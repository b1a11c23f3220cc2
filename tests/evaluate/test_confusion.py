"""Promises of F1 and Matthews' correlation: known values, honest intervals, differences over the same items."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from halfbyte.errors import EvaluateError
from halfbyte.evaluate.confusion import Counted, macro_f1, matthews


def f1_by_definition(are: list[int], taken: list[int]) -> float:
    scores = []
    for c in sorted({*are, *taken}):
        right = sum(a == t == c for a, t in zip(are, taken, strict=True))
        precision = right / taken.count(c) if taken.count(c) else 0.0
        recall = right / are.count(c) if are.count(c) else 0.0
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


def correlation(are: list[int], taken: list[int]) -> float:
    """Pearson's, summed over the classes' indicators: what R_K is by Gorodkin's definition."""
    x, y = (np.eye(4)[side] for side in (are, taken))
    x, y = x - x.mean(0), y - y.mean(0)
    spread = (x * x).sum() * (y * y).sum()
    return float((x * y).sum() / math.sqrt(spread)) if spread else 0.0


def counted(are: list[int], taken: list[int], metric: object = macro_f1) -> Counted:
    pairs = dict(enumerate(zip(are, taken, strict=True)))
    return Counted(metric, 4, {f"item {i}": pair for i, pair in pairs.items()})  # type: ignore[arg-type]


def test_both_are_what_their_definitions_say() -> None:
    random = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        for _ in range(20):
            are, taken = (random.integers(0, 4, n).tolist() for _ in range(2))
            table = counted(are, taken).table
            assert table.sum() == n
            assert macro_f1(table) == pytest.approx(f1_by_definition(are, taken))
            assert matthews(table) == pytest.approx(correlation(are, taken))
    tables = np.stack([counted(a, t).table for a, t in (([0, 1], [0, 1]), ([0, 1], [1, 0]))])
    assert macro_f1(tables).tolist() == [1.0, 0.0]
    assert matthews(tables).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("metric", [macro_f1, matthews])
def test_intervals_cover_as_often_as_they_say(metric: object) -> None:
    """150 intervals of 95 %: fewer than 131 hits have a probability below 1e-4 if they cover as often as they say."""
    random = np.random.default_rng(1)
    weights = random.dirichlet(np.full(9, 1.0)).reshape(3, 3) + 0.1 * np.eye(3)
    weights /= weights.sum()
    cells = np.zeros((4, 4))
    cells[:3, :3] = weights
    true = float(metric((cells * 1e7).astype(np.int64)))  # type: ignore[operator]
    hits = 0
    for seed in range(150):
        drawn = random.choice(16, 200, p=cells.ravel())
        found = counted((drawn // 4).tolist(), (drawn % 4).tolist(), metric).interval(
            resamples=300, seed=seed
        )
        hits += found.low <= true <= found.high
    assert hits >= 131


def test_a_difference_is_taken_item_by_item() -> None:
    random = np.random.default_rng(2)
    are = random.integers(0, 3, 300).tolist()
    old = [a if random.random() < 0.7 else (a + 1) % 3 for a in are]
    new = [a if random.random() < 0.3 and a != t else t for a, t in zip(are, old, strict=True)]
    before, after = counted(are, old), counted(are, new)
    found = before.difference(after, resamples=500)
    assert found.value == pytest.approx(f1_by_definition(are, new) - f1_by_definition(are, old))
    alone = [side.interval(resamples=500) for side in (before, after)]
    assert 0 < found.low < found.value < found.high
    assert found.high - found.low < min(side.high - side.low for side in alone)
    assert found == before.difference(after, resamples=500)
    same = before.difference(before, resamples=100)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_items_of_one_side_only_are_refused() -> None:
    with pytest.raises(EvaluateError, match=r"HB602[\s\S]*item 2"):
        counted([0, 1], [0, 1]).difference(counted([0, 1, 1], [0, 1, 1]))


def test_one_item_has_no_interval() -> None:
    found = counted([1], [1]).interval()
    assert (found.value, found.low, found.high) == (1.0, -math.inf, math.inf)


def test_the_order_of_items_changes_nothing() -> None:
    are, taken = [0, 1, 2, 1, 0, 2, 2], [0, 1, 1, 1, 2, 2, 0]
    first = counted(are, taken)
    turned = Counted(macro_f1, 4, dict(reversed(first.answers.items())))
    assert first.interval(resamples=200) == turned.interval(resamples=200)
    assert all(first.difference(turned, resamples=100).value == 0.0 for _ in itertools.repeat(0, 1))
