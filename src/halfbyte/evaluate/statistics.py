"""Intervals for what was measured on items: means, ratios of sums, proportions, paired differences.

It owns the statistics and needs numpy only; it must not know models, tokens or files.

Every metric here is a ratio of sums over items: loss per token is the sum of the items' losses over the sum
of their tokens, a mean is the same with one token each. Items are resampled whole, because the tokens of one
text are not independent. Zero or all successes make a bootstrap interval of width zero, which would be a
lie; 0/1 items therefore get an interval that stays honest there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from halfbyte.errors import EvaluateError, listed

Float = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
DRAWS_AT_ONCE = 1 << 19
"""Items drawn per step of the bootstrap; bounds its memory at about 15 MB whatever is resampled."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A measured value and the range that covers the true one with probability `level`.

    Args:
        value: What was measured on these items.
        low: Lower end; -inf where the items say nothing about it.
        high: Upper end; inf where the items say nothing about it.
        method: How the ends were got.
        n: Number of independent items.
        level: Two-sided coverage.
    """

    value: float
    low: float
    high: float
    method: str
    n: int
    level: float = LEVEL

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the value, such as `math.exp`."""
        ends = (function(self.value), function(self.low), function(self.high))
        return Interval(*ends, self.method, self.n, self.level)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """The fields for JSON, which has no infinity: an unknown end is None."""
        fields: dict[str, float | int | str] = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


@dataclass(frozen=True)
class Score:
    """What one item contributes to a ratio of sums.

    Args:
        id: Content hash of the item.
        total: Its part of the numerator, such as the sum of its tokens' losses or 1.0 for a right answer.
        count: Its part of the denominator, such as its number of tokens.
    """

    id: str
    total: float
    count: float = 1.0


def bootstrap_mean(
    values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Mean of the items' values with a bootstrap interval, or the exact one where all values are 0 or 1.

    Args:
        values: (n,) finite numbers, one per item.
        resamples: Number of bootstrap resamples, at least 100.
        seed: Same seed and values, same interval.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB601 for no values, values that are not finite, or a level or resamples out of range.
    """
    x = _checked(values, "values")
    if bool(np.isin(x, (0.0, 1.0)).all()):
        return proportion(int(x.sum()), x.size, level=level)
    return bootstrap_ratio(x, np.ones_like(x), resamples=resamples, seed=seed, level=level)


def bootstrap_ratio(
    totals: ArrayLike, counts: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Sum of totals over sum of counts, with the bias-corrected and accelerated (BCa) bootstrap over items.

    One item alone says nothing about the spread: its interval is infinite. Few items say little: in
    simulation with skewed items the 95 % interval covers 94 % at 100 items, 92 % at 20 and 84 % at 4.

    Args:
        totals: (n,) finite numbers, such as each item's summed loss.
        counts: (n,) positive numbers, such as each item's tokens.
        resamples: Number of bootstrap resamples, at least 100.
        seed: Same seed and items, same interval.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB601 for no items, unequal lengths, values that are not finite, counts that are not
            positive, or a level or resamples out of range.

    Source: Efron, "Better bootstrap confidence intervals" (1987), section 4.
    """
    x, y = _checked(totals, "totals"), _checked(counts, "counts")
    if x.size != y.size or bool((y <= 0).any()):
        problem = f"{x.size} totals and {y.size} counts" if x.size != y.size else f"a count of {y.min():g}"
        raise EvaluateError("HB601", f"got {problem}, expected one positive count per total")
    if resamples < 100:
        raise EvaluateError("HB601", f"got {resamples} resamples, expected at least 100")
    _check_level(level)
    n, value = x.size, float(x.sum() / y.sum())
    if n == 1:
        return Interval(value, -math.inf, math.inf, "one item: no interval", n, level)
    low, high = _bca_ends(x, y, value, _resampled(x, y, resamples, seed), level)
    return Interval(value, low, high, f"BCa bootstrap, {resamples} resamples", n, level)


def ratio_of_means(numerators: ArrayLike, denominators: ArrayLike, *, level: float = LEVEL) -> Interval:
    """Mean over mean of paired items, a ratio known not to be negative, by Fieller's theorem.

    Single items may have either sign. Where the mean below cannot be told from zero the interval has no upper end,
    and where nothing is known it is 0 to infinity: it then says so instead of being narrow by luck.

    Args:
        numerators: (n,) finite numbers.
        denominators: (n,) finite numbers.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB601 for no items, unequal lengths, values that are not finite, or a level out of range.

    Source: Fieller, "Some problems in interval estimation" (1954), section 3.
    """
    x, y = _checked(numerators, "numerators"), _checked(denominators, "denominators")
    if x.size != y.size:
        raise EvaluateError("HB601", f"got {x.size} numerators and {y.size} denominators, expected pairs")
    _check_level(level)
    n, (above, below) = x.size, (float(x.mean()), float(y.mean()))
    value = max(above, 0.0) / below if below > 0.0 else math.inf
    low, high = 0.0, math.inf
    if n > 1:
        (xx, xy), (_, yy) = (np.cov(x, y) * _student_t((1.0 + level) / 2.0, n - 1) ** 2 / n).tolist()
        a, b, c = below**2 - yy, above * below - xy, above**2 - xx
        root = math.sqrt(max(b * b - a * c, 0.0))
        if a > 0.0:  # between the roots
            low, high = max((b - root) / a, 0.0), max((b + root) / a, 0.0)
        elif (
            a < 0.0 and (b + root) / a < 0.0 < (b - root) / a
        ):  # outside of them, and one is out of the question
            low = (b - root) / a
    return Interval(value, low, high, "Fieller", n, level)


def proportion(successes: int, n: int, *, level: float = LEVEL) -> Interval:
    """Proportion of successes with the exact (Clopper-Pearson) interval, which covers at least what it says.

    Args:
        successes: Items that succeeded, 0 to n.
        n: Items, at least 1.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB601 for numbers out of range.

    Source: Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the
    binomial" (1934).
    """
    if not 0 <= successes <= n or n == 0:
        raise EvaluateError("HB601", f"got {successes} successes of {n}, expected 0 to n of at least 1")
    _check_level(level)
    tail = (1.0 - level) / 2.0
    k = np.arange(n + 1, dtype=np.float64)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])
    log_choose = log_factorial[n] - log_factorial - log_factorial[::-1]

    def at_least(s: int, p: float) -> float:  # P(X >= s) of a binomial (n, p), increasing in p
        return float(np.exp(log_choose[s:] + k[s:] * math.log(p) + (n - k[s:]) * math.log1p(-p)).sum())

    low = 0.0 if successes == 0 else _root(lambda p: at_least(successes, p) - tail, 0.0, 1.0)
    high = 1.0 if successes == n else _root(lambda p: at_least(successes + 1, p) - (1.0 - tail), 0.0, 1.0)
    return Interval(successes / n, low, high, "exact binomial", n, level)


def paired_difference(
    before: Sequence[Score],
    after: Sequence[Score],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Difference after minus before of two evaluations on the same items, joined by id.

    Items that are easy or hard for both drop out of the comparison, so that it needs far fewer of them than
    two intervals side by side. Right/wrong items get Tango's score interval, whose width is not zero where
    no answer changed; all others the bootstrap.

    Args:
        before: One score per item.
        after: The same items, in any order.
        resamples: Number of bootstrap resamples, at least 100.
        seed: Same seed and items, same interval.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB602 where items are missing on one side or count differently or stand there
            twice (all are counted, the first are named); HB601 as in `bootstrap_ratio`.
    """
    old, new = _by_id(before, "before"), _by_id(after, "after")
    wrong = [f"{i} only before" for i in old if i not in new]
    wrong += [f"{i} only after" for i in new if i not in old]
    wrong += [
        f"{i} counts {score.count:g} before, {new[i].count:g} after"
        for i, score in old.items()
        if i in new and new[i].count != score.count
    ]
    if wrong:
        raise EvaluateError(
            "HB602",
            f"{len(wrong)} items do not match:{listed(wrong)}",
            fix="evaluate both models on the same rows, with the same template, tokenizer and maximum length",
        )
    x = _checked([old[i].total for i in old], "totals before")
    y = _checked([new[i].total for i in old], "totals after")
    counts = np.array([old[i].count for i in old])
    if bool((counts == 1).all() and np.isin(x, (0.0, 1.0)).all() and np.isin(y, (0.0, 1.0)).all()):
        return _tango(int((y > x).sum()), int((y < x).sum()), x.size, level)
    return bootstrap_ratio(y - x, counts, resamples=resamples, seed=seed, level=level)


def _by_id(scores: Iterable[Score], side: str) -> dict[str, Score]:
    by_id: dict[str, Score] = {}
    copies = []
    for score in scores:
        if score.id in by_id:
            copies.append(score.id)
        by_id[score.id] = score
    if copies:
        raise EvaluateError(
            "HB602", f"{len(copies)} items appear again {side}:{listed(copies)}", fix="keep one of each"
        )
    return by_id


def _checked(values: ArrayLike, name: str) -> Float:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise EvaluateError(
            "HB601", f"{name} have shape {array.shape}, expected one number for at least one item"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise EvaluateError(
            "HB601", f"{bad.size} of {array.size} {name} are not finite, the first is item {bad[0]}"
        )
    return array


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise EvaluateError("HB601", f"got level {level:g}, expected a number between 0 and 1, such as 0.95")


def _resampled(x: Float, y: Float, resamples: int, seed: int) -> Float:
    """Ratios (resamples,) of items drawn with replacement."""
    rng, n = np.random.default_rng(seed), x.size
    rows = max(1, DRAWS_AT_ONCE // n)
    ratios = np.empty(resamples)
    for begin in range(0, resamples, rows):
        end = min(begin + rows, resamples)
        drawn = rng.integers(0, n, size=(end - begin, n))
        ratios[begin:end] = x.take(drawn).sum(axis=1) / y.take(drawn).sum(axis=1)
    return ratios


def _bca_ends(x: Float, y: Float, value: float, ratios: Float, level: float) -> tuple[float, float]:
    """Ends of the BCa interval, from the resampled ratios and the jackknife.

    A resample of few items spreads less than the items' source does; the quantiles are widened to what makes
    the plain interval of a normal mean exact.

    Source: Hesterberg, "What teachers should know about the bootstrap" (2015), section 5.3, expanded
    percentiles.
    """
    if ratios.min() == ratios.max():
        return float(ratios[0]), float(ratios[0])
    below = (np.count_nonzero(ratios < value) + 0.5 * np.count_nonzero(ratios == value)) / ratios.size
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / ratios.size), 1.0 - 0.5 / ratios.size))
    left_out = (x.sum() - x) / (y.sum() - y)  # (n,): the ratio without each item
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6.0 * spread**1.5) if spread > 0.0 else 0.0

    def quantile(z: float) -> float:
        shifted = bias + z
        return _NORMAL.cdf(bias + shifted / max(1.0 - acceleration * shifted, 1e-9))

    z = math.sqrt(x.size / (x.size - 1.0)) * _student_t((1.0 + level) / 2.0, x.size - 1)
    low, high = np.quantile(ratios, [quantile(-z), quantile(z)])
    return float(low), float(high)


def percentile_ends(values: Float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the percentile interval of a resampled number, widened for few items as `bootstrap_ratio`'s are.

    Args:
        values: (resamples,) the number in each resample.
        n: Items, at least 2.
        level: Two-sided coverage, between 0 and 1.

    Raises:
        EvaluateError: HB601 for a level out of range, or fewer than 100 resamples.

    Source: Hesterberg, "What teachers should know about the bootstrap" (2015), section 5.3, expanded percentiles.
    """
    if values.size < 100:
        raise EvaluateError("HB601", f"got {values.size} resamples, expected at least 100")
    _check_level(level)
    z = math.sqrt(n / (n - 1.0)) * _student_t((1.0 + level) / 2.0, n - 1)
    low, high = np.quantile(values, [_NORMAL.cdf(-z), _NORMAL.cdf(z)])
    return float(low), float(high)


def _student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t, to 0.1 % from four degrees of freedom up and too small below.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.5.
    """
    z = _NORMAL.inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4.0,
        (5.0 * z**5 + 16.0 * z**3 + 3.0 * z) / 96.0,
        (3.0 * z**7 + 19.0 * z**5 + 17.0 * z**3 - 15.0 * z) / 384.0,
        (79.0 * z**9 + 776.0 * z**7 + 1482.0 * z**5 - 1920.0 * z**3 - 945.0 * z) / 92160.0,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def _tango(won: int, lost: int, n: int, level: float) -> Interval:
    """Score interval of the difference of two paired proportions, (won - lost) / n.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design" (1998), equations 9 and 13.
    """
    _check_level(level)
    z, value = _NORMAL.inv_cdf((1.0 + level) / 2.0), (won - lost) / n

    def score(d: float) -> float:  # of the hypothesis that the difference is d; falls as d grows
        b = (2 * n - won + lost) * d - won - lost
        q = (math.sqrt(max(b * b + 8.0 * n * lost * d * (1.0 - d), 0.0)) - b) / (4.0 * n)
        variance = n * (2.0 * q + d * (1.0 - d))
        return (won - lost - n * d) / math.sqrt(variance) if variance > 0.0 else math.inf * (value - d)

    low = -1.0 if value == -1.0 else _root(lambda d: z - score(d), -1.0, value)
    high = 1.0 if value == 1.0 else _root(lambda d: -z - score(d), value, 1.0)
    return Interval(value, low, high, "Tango score", n, level)


def _root(increasing: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses zero, by halving until floats are exhausted."""
    while low < (middle := 0.5 * (low + high)) < high:
        if increasing(middle) < 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
