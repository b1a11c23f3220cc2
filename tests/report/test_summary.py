"""Promises of the summary: paired differences, honest verdicts, JSON without infinities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.data.order import Usage
from halfbyte.errors import EvaluateError
from halfbyte.evaluate.answers import Answer, ExactMatchResult
from halfbyte.evaluate.measure import Measurement
from halfbyte.evaluate.perplexity import ItemLoss, LossResult
from halfbyte.evaluate.statistics import bootstrap_ratio, proportion
from halfbyte.report.summary import Setting, Summary, compare, side_by_side
from halfbyte.train.loop import TrainResult


def _loss(values: list[float]) -> LossResult:
    items = tuple(ItemLoss(f"{n:016x}", f"rows.jsonl:{n}", value, 1) for n, value in enumerate(values))
    loss = bootstrap_ratio(values, [1] * len(values), resamples=200)
    return LossResult(items, loss, loss.map(lambda x: 2.0**x), 0)


def _answers(right: list[bool]) -> ExactMatchResult:
    items = tuple(
        Answer(f"{n:016x}", f"rows.jsonl:{n}", f"p{n}", "yes", "yes" if ok else "no", ok, 1, True)
        for n, ok in enumerate(right)
    )
    return ExactMatchResult(items, proportion(sum(right), len(right)), 0, 0, 0)


SPREAD = [1.0, 5.0, 2.0, 9.0, 4.0, 7.0, 3.0, 8.0]


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [([-0.5, -0.6] * 4, "better"), ([0.5, 0.6] * 4, "worse"), ([0.5, -0.5] * 4, "not shown")],
)
def test_a_verdict_needs_the_paired_interval_to_exclude_zero(shift: list[float], verdict: str) -> None:
    """The items spread far wider than they change: only pairing shows it."""
    after = [x + d for x, d in zip(SPREAD, shift, strict=True)]
    loss, perplexity = compare(
        Measurement.of_words(_loss(SPREAD), None), Measurement.of_words(_loss(after), None), resamples=200
    )
    assert (loss.name, loss.verdict) == ("loss", verdict)
    assert (perplexity.name, perplexity.verdict) == ("perplexity", verdict)
    assert loss.after.low < loss.before.value < loss.after.high  # side by side they overlap


def test_more_right_answers_are_better() -> None:
    none, all_ = _answers([False] * 20), _answers([True] * 20)
    (up,) = compare(Measurement.of_words(None, none), Measurement.of_words(None, all_))
    (down,) = compare(Measurement.of_words(None, all_), Measurement.of_words(None, none))
    assert (up.verdict, down.verdict) == ("better", "worse")


def test_different_items_are_not_compared() -> None:
    with pytest.raises(EvaluateError, match="HB602"):
        compare(Measurement.of_words(_loss(SPREAD), None), Measurement.of_words(_loss(SPREAD[:7]), None))


def test_samples_are_the_first_rows_whatever_was_answered() -> None:
    before, after = _answers([False, True, False]), _answers([False, False, True])
    shown = side_by_side(Measurement.of_words(None, before), Measurement.of_words(None, after), 2)
    assert [(s.prompt, s.before, s.after) for s in shown] == [("p0", "no", "no"), ("p1", "yes", "no")]
    assert [(s.right_before, s.right_after) for s in shown] == [(False, False), (True, False)]


def test_unknown_ends_are_null_in_json(tmp_path: Path) -> None:
    single = Measurement.of_words(_loss([2.0]), None)  # one item says nothing about its spread
    summary = Summary(
        setting=Setting("sft", "m", "lora", "plain", "float32", None, 1, 2, 8, 3, 1, 0, 0, 0),
        changes=compare(single, single, resamples=200),
        samples=(),
        training=TrainResult(
            1,
            1.0,
            2.0,
            2.0,
            3,
            2,
            None,
            None,
            Usage(1, 1.0, None, 1.0),
            0.5,
            6.0,
            None,
            tmp_path / "metrics.jsonl",
        ),
        phase_seconds={"train": 0.5},
        peak_rss_bytes=None,
    )
    content = json.loads(json.dumps(summary.as_dict(), allow_nan=False))
    assert content["metrics"]["loss"]["before"] | {"method": "", "level": 0} == {
        "value": 2.0,
        "low": None,
        "high": None,
        "method": "",
        "n": 1,
        "level": 0,
    }
    assert content["peak_rss_bytes"] is None
    assert content["training"]["metrics"] == "metrics.jsonl"
