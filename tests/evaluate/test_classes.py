"""Promises of the measurement of classes: what is right is counted right, row by row and class by class."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import EvaluateError
from halfbyte.evaluate.classes import Answered, measured_classes
from halfbyte.evaluate.statistics import proportion
from halfbyte.report.summary import compare

LABELS = ("bad", "fair", "good")
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3], [0.05, 0.05, 0.9]])
TARGETS = np.array([0, 1, 2, 2])


def answered(probabilities: np.ndarray = PROBABILITIES) -> Answered:
    ids = [f"row {n}" for n in range(len(probabilities))]
    return Answered(ids, [f"rows:{n}" for n in range(len(ids))], np.log(probabilities), TARGETS)


def test_metrics_and_records_are_counted_right(tmp_path: Path) -> None:
    found = measured_classes(answered(), LABELS)
    values = {metric.name: metric.interval for metric in found.metrics}
    assert values["accuracy"] == proportion(3, 4)
    assert values["macro_f1"].value == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert values["label_loss"].value == pytest.approx(-np.log([0.7, 0.6, 0.3, 0.9]).mean())
    found.write(tmp_path, "after")
    rows = [json.loads(line) for line in (tmp_path / "after.labels.jsonl").read_text().splitlines()]
    assert [(r["label"], r["predicted"], r["correct"]) for r in rows] == [
        ("bad", "bad", True),
        ("fair", "fair", True),
        ("good", "fair", False),
        ("good", "good", True),
    ]
    assert rows[2]["probability"] == pytest.approx(0.5)
    assert rows[2]["nll"] == pytest.approx(-math.log(0.3))
    classes = [json.loads(line) for line in (tmp_path / "after.classes.jsonl").read_text().splitlines()]
    fair = classes[1]
    assert (fair["label"], fair["rows"], fair["predicted"], fair["correct"]) == ("fair", 1, 2, 1)
    half = proportion(1, 2)
    assert fair["precision"] == [half.value, half.low, half.high]
    assert fair["f1"] == pytest.approx(2 / 3)


def test_a_class_without_rows_has_no_recall() -> None:
    only_bad = Answered(["a"], ["rows:0"], np.log([[0.8, 0.1, 0.1]]), np.array([0]))
    records = measured_classes(only_bad, LABELS).records["classes"]
    assert records[1].recall is None  # type: ignore[attr-defined]
    assert records[1].precision is None  # type: ignore[attr-defined]


def test_before_and_after_are_compared_in_every_metric() -> None:
    changes = compare(
        measured_classes(answered(PROBABILITIES[::-1]), LABELS), measured_classes(answered(), LABELS)
    )
    assert [c.name for c in changes] == ["accuracy", "macro_f1", "matthews", "label_loss"]
    for change in changes:
        assert change.difference is not None
        assert change.difference.value == pytest.approx(change.after.value - change.before.value)


@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_probabilities_that_are_no_numbers_name_their_row(odd: float) -> None:
    strange = answered()
    strange.log_probabilities[1, 0] = odd
    with pytest.raises(EvaluateError, match=r"HB610[\s\S]*rows:1 is the first"):
        measured_classes(strange, LABELS)
