"""Promises of labels: numbered in a fixed order, and never one that was not trained on."""

from __future__ import annotations

import pytest

from halfbyte.data.labels import LabelReport, label_names, refuse_unknown, train_labels
from halfbyte.data.row import Row
from halfbyte.errors import DataError


def row(text: str, label: int | str, line: int = 1, pair: str | None = None) -> Row:
    return Row(None, text, "rows.jsonl", line, "text", label=label, text_pair=pair)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "9", "2"], ("2", "9", "10")),
        (["b", "a", "b", "C"], ("C", "a", "b")),
        (["1", "one"], ("1", "one")),
        ([], ()),
    ],
)
def test_labels_are_in_order_of_number_or_name(names: list[str], expected: tuple[str, ...]) -> None:
    assert label_names(names) == expected


def test_fewer_than_two_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"HB231 .*all 2 rows to train on have the label 'a'"):
        train_labels([row("x", "a"), row("y", "a")])
    with pytest.raises(DataError, match="HB231"):
        train_labels([])
    assert train_labels([row("x", 1), row("y", 0)]) == ("0", "1")


def test_labels_that_were_never_trained_on_name_their_rows() -> None:
    refuse_unknown([row("x", 1)], ("0", "1"))
    with pytest.raises(DataError) as caught:
        refuse_unknown([row("x", "a"), row("y", "c", 7), row("z", "d", 9)], ("a", "b"))
    assert caught.value.code == "HB232"
    assert "2 of 3" in caught.value.what
    assert "rows.jsonl:7: 'c'" in caught.value.what
    assert "rows.jsonl:9: 'd'" in caught.value.what


def test_the_balance_is_counted_side_by_side() -> None:
    train = [row("x", "a"), row("y", "a"), row("z", "b"), row("x", "b"), row("x", "b", pair="other")]
    report = LabelReport.of(("a", "b"), train, [row("w", "b")])
    assert report == LabelReport({"a": 2, "b": 3}, {"a": 0, "b": 1}, 1)
    assert LabelReport.of(("a", "b"), [], train).described().startswith("labels a 2 (40%), b 3 (60%)")
    assert report.described() == "labels a 2 (40%), b 3 (60%); 1 texts have more than one label"
