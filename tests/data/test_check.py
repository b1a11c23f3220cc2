"""Checking rows: what is refused, what is counted, and how rows are held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from halfbyte.data.check import Lengths, check_overlap, check_rows, split_rows
from halfbyte.data.faults import Fault, Reading
from halfbyte.data.row import Message, Row
from halfbyte.errors import DataError

CALLED = (
    Message("user", "a"),
    Message("assistant", "", ({"function": {"name": "f", "arguments": {}}},)),
    Message("tool", "b"),
    Message("tool", "c"),
    Message("assistant", "d"),
)


def text(content: str, line: int = 1) -> Row:
    return Row(None, content, "rows.jsonl", line, "text")


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="HB203"):
        check_rows([])


def test_all_rows_nothing_can_be_learnt_from_are_named(chat: Callable[..., Row]) -> None:
    rows = [
        chat("a", "b", line=1),
        chat("a", "", line=2),
        chat("a", " \n", "b", "c", line=3),
        chat("a", line=4),
        chat("a", "b", "c", line=5),
        text("\n", 6),
        Row((Message("system", "a"),), None, "rows.jsonl", 7),
        Row((Message("user", "a"), Message("tool", "b"), Message("assistant", "c")), None, "rows.jsonl", 8),
        Row((*CALLED[:2], Message("user", "b"), *CALLED[2:]), None, "rows.jsonl", 9),
        Row(CALLED[:-1], None, "rows.jsonl", 10),
        Row(CALLED, None, "rows.jsonl", 11),
    ]
    with pytest.raises(DataError) as caught:
        check_rows(rows)
    said = str(caught.value)
    assert caught.value.code == "HB204"
    assert "9 of 11 rows" in said
    for reason in (
        "rows.jsonl:2: the answer is blank (message 2)",
        "rows.jsonl:3: the answer is blank (message 2)",
        "rows.jsonl:4: no message is from the assistant",
        "rows.jsonl:5: the last message is from the user",
        "rows.jsonl:6: the text is blank",
        "rows.jsonl:7: no message is from the assistant",
        "rows.jsonl:8: no call of a tool precedes what one returns (message 2)",
        "rows.jsonl:9: no call of a tool precedes what one returns (message 4)",
        "rows.jsonl:10: the last message is from the tool, expected the assistant's answer",
    ):
        assert reason in said


def test_rows_for_another_objective_are_named_with_theirs(chat: Callable[..., Row]) -> None:
    pair = replace(chat("a", "b", line=2), rejected=chat("a", "c").messages)
    verdict = replace(chat("a", "b", line=3), label=True)
    classified = replace(text("a", 4), label=0)
    with pytest.raises(DataError) as caught:
        check_rows([chat("a", "b"), pair, verdict, classified], reading=Reading(allowed=9))
    assert caught.value.code == "HB216"
    said = str(caught.value)
    assert "3 of 4 rows are not for sft" in said
    for reason in ("2: a preference row", "3: a kto row", "4: a classification row"):
        assert f"rows.jsonl:{reason}" in said
    for row in (pair, verdict, classified):
        assert check_rows([row], row.objective).rows == (row,)
    with pytest.raises(DataError, match="1 of 1 rows are not for kto"):
        check_rows([pair], "kto")


def test_pairs_and_classified_texts_nothing_can_be_learnt_from_are_named(chat: Callable[..., Row]) -> None:
    good = chat("a", "b")
    pairs = [
        replace(good, line=1, rejected=good.messages),
        replace(good, line=2, rejected=chat("a", " ").messages),
        replace(good, line=3, rejected=chat("a").messages),
    ]
    with pytest.raises(DataError) as caught:
        check_rows(pairs, "preference")
    for reason in (
        "rows.jsonl:1: the chosen and the rejected answer are the same",
        "rows.jsonl:2: rejected: the answer is blank (message 2)",
        "rows.jsonl:3: rejected: no message is from the assistant",
    ):
        assert reason in str(caught.value)
    with pytest.raises(DataError, match="rows.jsonl:1: the text is blank"):
        check_rows([replace(text("a"), text_pair=" ", label=1)], "classification")


def test_as_many_bad_rows_as_allowed_are_skipped_and_one_more_is_an_error(chat: Callable[..., Row]) -> None:
    rows = [chat("a", "b"), chat("a", "", line=2), text(" ", 3), text("c", 4)]
    reading = Reading(allowed=3, skipped=[Fault("rows.jsonl", 9, "not JSON")])
    dataset = check_rows(rows, reading=reading)
    assert dataset.rows == (rows[0], rows[3])
    assert dataset.report.rows == 2
    assert [fault.line for fault in reading.skipped] == [9, 2, 3]
    with pytest.raises(DataError) as caught:
        check_rows(rows, reading=Reading(allowed=2, skipped=[Fault("rows.jsonl", 9, "not JSON")]))
    assert caught.value.code == "HB204"
    said = str(caught.value)
    assert "2 of 4 rows; 2 may be skipped in all" in said
    for reason in ("9: not JSON", "2: the answer is blank", "3: the text is blank"):
        assert f"rows.jsonl:{reason}" in said
    with pytest.raises(DataError, match="HB203"):
        check_rows([text(" ")], reading=Reading(allowed=1))


def test_the_report_counts_rows_duplicates_roles_and_lengths(chat: Callable[..., Row]) -> None:
    rows = [chat("ab", "cd"), chat("ab", "cd"), chat("", "x", system="abc"), text("0123456789")]
    dataset = check_rows(rows)
    assert dataset.rows == tuple(rows)
    report = dataset.report
    assert (report.rows, report.duplicates, report.empty_prompts) == (4, 1, 1)
    assert report.styles == {"chat": 3, "text": 1}
    assert report.roles == {"user": 3, "assistant": 3, "system": 1}
    assert report.labels == {}
    assert report.characters == Lengths(4, 4, 10, 10)
    judged = [replace(row, label=label) for row, label in zip(rows[:3], (True, True, False), strict=True)]
    assert check_rows(judged, "kto").report.labels == {"True": 2, "False": 1}
    pair = replace(chat("ab", "cd"), rejected=chat("ab", "efg").messages)
    assert check_rows([pair], "preference").report.characters.longest == 9


def test_the_held_out_share_is_exact_and_in_order() -> None:
    rows = [text(str(n), n) for n in range(200)]
    train, held_out = split_rows(rows, 0.1, seed=0)
    assert len(held_out) == 20
    assert sorted([*train, *held_out], key=lambda r: r.line) == rows
    assert [r.line for r in train] == sorted(r.line for r in train)


def test_the_split_depends_on_words_and_seed_alone() -> None:
    rows = [text(str(n), n) for n in range(200)]
    held_out = {r.id for r in split_rows(rows, 0.2, seed=3)[1]}
    moved = [Row(None, r.text, "other.jsonl", 1000 - r.line, "text") for r in reversed(rows)]
    assert {r.id for r in split_rows(moved, 0.2, seed=3)[1]} == held_out
    assert {r.id for r in split_rows(rows, 0.2, seed=4)[1]} != held_out


def test_equal_rows_never_straddle_the_split() -> None:
    rows = [text(str(n % 20), n) for n in range(100)]
    for seed in range(5):
        train, held_out = split_rows(rows, 0.3, seed)
        assert not {r.id for r in train} & {r.id for r in held_out}
        assert len({r.id for r in held_out}) == 6


def test_no_share_holds_out_nothing_and_any_share_at_least_one_row_on_each_side() -> None:
    rows = [text("a"), text("b")]
    assert split_rows(rows, 0, 0) == (rows, [])
    for fraction in (0.001, 0.999):
        assert [len(side) for side in split_rows(rows, fraction, 0)] == [1, 1]


def test_a_single_distinct_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="HB211"):
        split_rows([text("a"), text("a", 2)], 0.1, 0)


def test_evaluation_rows_that_are_trained_on_are_named() -> None:
    check_overlap([text("a"), text("b")], [text("c")])
    with pytest.raises(DataError) as caught:
        check_overlap([text("a", 1), text("b", 2), text("b", 3)], [text("c", 4), text("b", 5)])
    assert caught.value.code == "HB205"
    assert "1 of 2 evaluation rows" in str(caught.value)
    assert "rows.jsonl:5 equals rows.jsonl:2" in str(caught.value)
