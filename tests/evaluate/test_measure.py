"""Promises of a measurement: which rows are answered, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.data.tokenise import Example
from halfbyte.evaluate.measure import Measurement, rows_to_answer
from halfbyte.settings import EvaluateConfig


def _example(number: int, answer: str | None = "yes") -> Example:
    ids = np.arange(4, dtype=np.int32)
    prompt = ids[:2] if answer is not None else None
    return Example(
        ids, ids > 1, prompt, answer, f"{number * 7919 % 997:016x}", f"r:{number}", truncated=False
    )


def test_auto_answers_only_rows_that_can_be_graded() -> None:
    rows = [_example(1), _example(2, None), _example(3)]
    assert [e.where for e in rows_to_answer(rows, EvaluateConfig())] == ["r:1", "r:3"]
    assert rows_to_answer(rows[1:2], EvaluateConfig()) == []


def test_asked_for_by_name_no_row_is_left_out_silently() -> None:
    rows = [_example(1), _example(2, None)]
    assert rows_to_answer(rows, EvaluateConfig(exact_match=True)) == rows
    assert rows_to_answer(rows, EvaluateConfig(exact_match=False)) == []


@pytest.mark.parametrize("reverse", [False, True])
def test_max_items_picks_the_same_rows_in_any_order(reverse: bool) -> None:
    rows = [_example(n) for n in range(20)]
    config = EvaluateConfig(max_items=5)
    chosen = rows_to_answer(rows[::-1] if reverse else rows, config)
    assert {e.id for e in chosen} == {e.id for e in rows_to_answer(rows, config)}
    assert len(chosen) == 5


def test_a_measurement_of_nothing_says_so() -> None:
    assert "nothing is measured" in Measurement(()).described()
