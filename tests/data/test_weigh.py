"""Weights of sources: how often rows come, which ones, and that held-out rows are never among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from halfbyte.data.check import split_rows
from halfbyte.data.row import Row
from halfbyte.data.weigh import file_weights, weigh_rows
from halfbyte.errors import DataError


def rows_of(source: str, count: int, start: int = 0) -> list[Row]:
    return [Row(None, f"text {start + n}", source, n + 1, "text") for n in range(count)]


@pytest.mark.parametrize(
    ("weight", "total", "times"),
    [
        (1.0, 40, {1}),
        (2.0, 80, {2}),
        (0.5, 20, {0, 1}),
        (1.5, 60, {1, 2}),
        (2.25, 90, {2, 3}),
        (0.01, 1, {0, 1}),
        (1e-9, 1, {0, 1}),
    ],
)
def test_a_weight_is_how_often_rows_come(weight: float, total: int, times: set[int]) -> None:
    heavy, other = rows_of("a", 40), rows_of("b", 7, start=100)
    weighed = weigh_rows([*heavy, *other], {"a": weight}, seed=0)
    counts = Counter(weighed)
    assert sum(counts[row] for row in heavy) == total
    assert {counts[row] for row in heavy} == times
    assert [row for row in weighed if row.source == "b"] == other
    assert weighed == sorted(weighed, key=lambda row: (row.source, row.line))


def test_which_rows_come_depends_on_content_and_seed_alone() -> None:
    rows = rows_of("a", 60)
    chosen = {row.id for row in weigh_rows(rows, {"a": 0.5}, seed=3)}
    moved = [Row(None, row.text, "b", 99 - n, "text") for n, row in enumerate(reversed(rows))]
    assert {row.id for row in weigh_rows(moved, {"b": 0.5}, seed=3)} == chosen
    assert {row.id for row in weigh_rows(rows, {"a": 0.5}, seed=4)} != chosen
    more = {row.id for row in weigh_rows(rows, {"a": 0.75}, seed=3)}
    assert chosen < more


def test_the_choice_has_nothing_to_do_with_the_one_of_held_out_rows() -> None:
    rows = rows_of("a", 1000)
    held_out = {row.id for row in split_rows(rows, 0.5, seed=0)[1]}
    chosen = {row.id for row in weigh_rows(rows, {"a": 0.5}, seed=0)}
    assert 200 < len(held_out & chosen) < 300  # 250 expected, standard deviation 8


def test_folders_lend_their_weight_to_their_files_and_two_weights_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("words\n")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert file_weights([tmp_path], [2]) == {a: 2, b: 2}
    assert file_weights([tmp_path, a], [2, 2]) == {a: 2, b: 2}
    with pytest.raises(DataError, match="got the weights 2 and 0.5") as caught:
        file_weights([tmp_path, a], [2, 0.5])
    assert (caught.value.code, caught.value.where) == ("HB217", a)
