"""Metrics of classes that are no sum over items, from counts of which class was taken for which: F1, Matthews.

It owns the table of counts, what is computed from it, and the bootstrap over its items; it must not know models or
files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import EvaluateError, listed
from halfbyte.evaluate.statistics import LEVEL, RESAMPLES, Float, Interval, percentile_ends

Table = NDArray[np.int64]
"""(..., C, C): items of class i that were taken for class j."""


def macro_f1(tables: Table) -> Float:
    """F1 of each class that occurs or was answered, averaged with equal weights.

    Args:
        tables: (..., C, C).

    Returns:
        (...), 0 to 1; a class of which nothing is right counts 0.
    """
    right = np.diagonal(tables, axis1=-2, axis2=-1).astype(np.float64)  # (..., C)
    either = tables.sum(-1) + tables.sum(-2)  # twice the right ones, once the wrong ones
    scores = 2.0 * right / np.maximum(either, 1)
    mean: Float = scores.sum(-1) / np.maximum((either > 0).sum(-1), 1)
    return mean


def matthews(tables: Table) -> Float:
    """Matthews' correlation of classes and answers, of any number of classes.

    Args:
        tables: (..., C, C).

    Returns:
        (...), -1 to 1; 0 where all items are of one class, or were taken for one.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient" (2004).
    """
    n = tables.sum((-2, -1)).astype(np.float64)
    right = np.trace(tables, axis1=-2, axis2=-1).astype(np.float64)
    are, taken = tables.sum(-1).astype(np.float64), tables.sum(-2).astype(np.float64)  # (..., C)
    covariance = right * n - (are * taken).sum(-1)
    spread = (n**2 - (are**2).sum(-1)) * (n**2 - (taken**2).sum(-1))
    return np.asarray(np.where(spread > 0, covariance / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0))


@dataclass(frozen=True)
class Counted:
    """A metric of the table of counts, with the items behind it.

    Args:
        metric: `macro_f1` or `matthews`.
        classes: Number of classes, C.
        answers: Class and answer of each item, by the item's content hash.
    """

    metric: Callable[[Table], Float]
    classes: int
    answers: Mapping[str, tuple[int, int]]

    @property
    def table(self) -> Table:
        """(C, C) counts."""
        return self._table(list(self.answers))

    def interval(self, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
        """The metric with a bootstrap interval over items.

        Args:
            resamples: At least 100.
            seed: Same seed and items, same interval.
            level: Two-sided coverage, between 0 and 1.
        """
        return _bootstrap([self], self.metric, (resamples, seed, level))

    def difference(
        self, after: object, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
    ) -> Interval:
        """After minus before on the same items, which are drawn with both their answers.

        Raises:
            EvaluateError: HB602 for items that only one side has.
        """
        assert isinstance(after, Counted), "one metric is computed in one way"
        _refuse_other_items(self.answers, after.answers)

        def gain(old: Table, new: Table) -> Float:
            return np.asarray(self.metric(new) - self.metric(old))

        return _bootstrap([self, after], gain, (resamples, seed, level))

    def cells(self, ids: list[str]) -> Table:
        """(n,) where in the flattened table each of some items counts."""
        pairs = np.array([self.answers[i] for i in ids], np.int64)
        cells: Table = pairs[:, 0] * self.classes + pairs[:, 1]
        return cells

    def _table(self, ids: list[str]) -> Table:
        return np.bincount(self.cells(ids), minlength=self.classes**2).reshape(self.classes, self.classes)


@dataclass(frozen=True)
class CountedRows:
    """A metric of the table of counts of words, whose rows are drawn whole: words of one row are not independent.

    Args:
        metric: As of `Counted`.
        tables: (C, C) counts of each row, by the row's content hash.
    """

    metric: Callable[[Table], Float]
    tables: Mapping[str, Table]

    def interval(self, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
        """The metric with a bootstrap interval over rows; arguments as of `Counted.interval`."""
        return self._drawn([self], self.metric, (resamples, seed, level))

    def difference(
        self, after: object, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
    ) -> Interval:
        """After minus before on the same rows.

        Raises:
            EvaluateError: HB602 for rows that only one side has.
        """
        assert isinstance(after, CountedRows), "one metric is computed in one way"
        _refuse_other_items(self.tables, after.tables)
        return self._drawn(
            [self, after],
            lambda old, new: np.asarray(self.metric(new) - self.metric(old)),
            (resamples, seed, level),
        )

    def _drawn(
        self, sides: Sequence[CountedRows], value: Callable[..., Float], how: tuple[int, int, float]
    ) -> Interval:
        resamples, seed, level = how
        ids, n = list(self.tables), len(self.tables)
        stacks = [np.stack([side.tables[i] for i in ids]) for side in sides]  # (n, C, C)
        point = float(value(*(stack.sum(0) for stack in stacks)))
        if n == 1:
            return Interval(point, -math.inf, math.inf, "one item: no interval", n, level)
        random = np.random.default_rng(seed)
        values = np.empty(resamples)
        for at in range(resamples):
            drawn = random.multinomial(n, np.full(n, 1.0 / n))
            values[at] = value(*(np.tensordot(drawn, stack, 1) for stack in stacks))
        low, high = percentile_ends(values, n, level)
        return Interval(point, low, high, f"bootstrap over rows, {resamples} resamples", n, level)


def _refuse_other_items(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    if odd := sorted(before.keys() ^ after.keys()):
        raise EvaluateError(
            "HB602",
            f"{len(odd)} items do not match:{listed(odd)}",
            fix="evaluate both models on the same rows",
        )


def _bootstrap(
    sides: Sequence[Counted], value: Callable[..., Float], how: tuple[int, int, float]
) -> Interval:
    """Draw items with replacement: only how many fall into each cell matters, which is one multinomial draw.

    Args:
        sides: Measurements of the same items.
        value: Takes one table (C, C) of each side.
        how: Resamples, seed, level.
    """
    resamples, seed, level = how
    ids, C = list(sides[0].answers), sides[0].classes
    cells, counts = np.unique(np.stack([side.cells(ids) for side in sides]), axis=1, return_counts=True)
    n = len(ids)

    def of(drawn: NDArray[np.int64]) -> float:
        tables = [np.bincount(each, drawn, C * C).astype(np.int64).reshape(C, C) for each in cells]
        return float(value(*tables))

    point = of(counts)
    if n == 1:
        return Interval(point, -math.inf, math.inf, "one item: no interval", n, level)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, resamples)
    low, high = percentile_ends(np.array([of(drawn) for drawn in draws]), n, level)
    return Interval(point, low, high, f"bootstrap, {resamples} resamples", n, level)
