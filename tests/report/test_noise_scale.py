"""Promises of the advice on a step's size: it follows the estimate, and says nothing that the steps do not show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import EvaluateError
from halfbyte.evaluate.statistics import Interval, ratio_of_means
from halfbyte.report.noise_scale import advice, noise_scale


def _metrics(folder: Path, pairs: list[tuple[float, float] | None]) -> Path:
    file = folder / "metrics.jsonl"
    names = ("grad_variance", "grad_signal")
    lines = [dict(zip(names, pair or (None, None), strict=True)) | {"loss": 1.0} for pair in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _drawn(
    variance: float, signal: float, spread: float, count: int = 60, seed: int = 0
) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    return [
        (variance + spread * float(a), signal + spread * float(b)) for a, b in random.normal(size=(count, 2))
    ]


@pytest.mark.parametrize(
    ("variance", "signal", "spread", "said"),
    [
        (6.0, 1.0, 0.5, "a larger step would help, of up to about 5"),
        (0.2, 1.0, 0.1, "a smaller step would learn more from each row"),
        (1.0, 1.0, 0.4, "the step is about as large as its noise asks for"),
        (0.5, 0.0, 2.0, "cannot be told"),
        (9.0, 0.0, 1.0, "or more times the rows"),
    ],
)
def test_the_advice_follows_the_later_half_of_the_steps(
    tmp_path: Path, variance: float, signal: float, spread: float, said: str
) -> None:
    early: list[tuple[float, float] | None] = [(1e6, 1e-3) if variance < 2 else (1e-3, 1e6)] * 61
    found = noise_scale(_metrics(tmp_path, [*early[:60], None, *_drawn(variance, signal, spread)]))
    assert found is not None
    assert found.n == 60
    assert said in advice(found)
    assert "from 60 steps" in advice(found)


def test_few_steps_or_single_micro_batches_give_nothing(tmp_path: Path) -> None:
    assert noise_scale(_metrics(tmp_path, [None] * 50)) is None
    assert noise_scale(_metrics(tmp_path, [(1.0, 1.0)] * 14)) is None
    assert noise_scale(_metrics(tmp_path, [(1.0, 1.0)] * 15)) is not None


def test_an_open_end_is_told_as_such() -> None:
    assert "noise scale in steps: at least 3," in advice(Interval(9.0, 3.0, math.inf, "", 10))
    assert "noise scale in steps: unknown," in advice(Interval(math.inf, 0.0, math.inf, "", 10))


def test_the_interval_of_a_ratio_covers_the_true_one() -> None:
    """2,000 draws of 20 items around 2 / 0.5, where the mean below is 2.2 of its errors away from zero."""
    random, held, open_ended = np.random.default_rng(1), 0, 0
    for _ in range(2000):
        x, y = random.normal(2.0, 1.0, 20), random.normal(0.5, 1.0, 20)
        found = ratio_of_means(x + 0.3 * y, y)
        held += found.low <= 2.0 / 0.5 + 0.3 <= found.high
        open_ended += math.isinf(found.high)
    assert 0.93 < held / 2000 < 0.975  # 95 %, its error half a per cent; cutting at zero only widens it
    assert 0.2 < open_ended / 2000 < 0.8
    assert ratio_of_means([1.0, 3.0], [2.0, 2.0]).value == 1.0
    assert (ratio_of_means([1.0], [2.0]).low, ratio_of_means([1.0], [2.0]).high) == (0.0, math.inf)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0])])
def test_a_ratio_of_nothing_is_refused(x: list[float], y: list[float]) -> None:
    with pytest.raises(EvaluateError, match="HB601"):
        ratio_of_means(x, y)
