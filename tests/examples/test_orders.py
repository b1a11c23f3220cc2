"""The demo's rows are what their generator makes, and none is on both sides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.config import load_config
from halfbyte.data.check import check_overlap
from halfbyte.data.read import read_rows
from halfbyte.tasks.known import prepare

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ROOT / "examples" / "orders"


@pytest.fixture
def make_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.orders.make_rows import make_rows

    return make_rows


def test_the_committed_rows_are_what_the_seed_gives(make_rows):
    for name, rows in zip(("train.jsonl", "heldout.jsonl"), make_rows(), strict=True):
        written = [json.loads(line) for line in (ORDERS / name).read_text(encoding="utf-8").splitlines()]
        assert written == rows, name


def test_no_order_and_no_record_is_on_both_sides():
    train, held_out = read_rows(ORDERS / "train.jsonl"), read_rows(ORDERS / "heldout.jsonl")
    assert len(train) >= 400
    assert len(held_out) >= 100
    check_overlap(train, held_out)
    for turn in (0, 1):
        assert not {r.messages[turn].content for r in train} & {r.messages[turn].content for r in held_out}


def test_the_recipe_cuts_no_row_and_trains_every_answer_whole():
    prepared = prepare(load_config(ORDERS / "recipe.yaml"))
    assert sum(prepared.rows.cut) == 0
    assert prepared.rows.misaligned == 0
    example = prepared.rows.held_out[0]
    trained = prepared.tokenizer.decode(example.input_ids[example.trained])
    assert trained == f"{example.answer}<|im_end|>"
