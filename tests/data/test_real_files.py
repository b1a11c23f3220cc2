"""The files people have: each is read to its last row, or refused for the right reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.data.check import check_rows
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.row import Objective
from halfbyte.errors import DataError

READ: list[tuple[str, str, Objective, int]] = [
    ("alpaca/alpaca_en_demo.json", "alpaca", "sft", 999),
    ("alpaca/identity.json", "alpaca", "sft", 91),
    ("oasst/guanaco-llama2-1k.parquet", "text", "sft", 1000),
    ("oasst/oa_questions.jsonl", "text", "sft", 953),
    ("sharegpt/fastchat_dummy_conversation.json", "sharegpt", "sft", 500),
    ("sharegpt/glaive_toolcall_en_demo.json", "sharegpt", "sft", 300),
    ("preference/dpo_en_demo.json", "preference", "preference", 300),
    ("preference/kto_en_demo.json", "kto", "kto", 300),
    ("sst2/train.tsv", "classification", "classification", 60_615 - 1),
    ("sst2/dev.tsv", "classification", "classification", 6736 - 1),
    ("sst2/test.tsv", "classification", "classification", 873 - 1),
    ("glue/RTE/train.tsv", "classification", "classification", 2128 - 1),
    ("glue/WNLI/train.tsv", "classification", "classification", 519 - 1),
    ("llm_adapters/ARC-Easy/train.json", "alpaca", "sft", 2251),
    ("text/c4_demo.jsonl", "text", "sft", 300),
    ("text/wiki_demo.txt", "text", "sft", 30),
    ("tinyshakespeare/input.txt", "text", "sft", 40_000 - 7223),
]
REFUSED: list[tuple[str, int, str]] = [
    ("alpaca/dataset_info.json", 1, ":1: expected a JSON array of objects"),
    ("sharegpt/v1_sft_demo.jsonl", 500, ":1: message 1: got keys 'role', 'content', 'loss_weight', expected"),
    ("self_instruct/seed_tasks.jsonl", 175, ":1: columns 'id', 'name', 'instruction', 'instances', 'is_clas"),
    ("self_instruct/alpaca_seed_tasks.jsonl", 175, ":175: columns"),
    ("self_instruct/user_oriented_instructions.jsonl", 252, ":252: columns 'id', 'motivation_app', 'instruc"),
    (
        "glue/CoLA/train.tsv",
        1,
        ":1: column 3 has no name; expected the names of the columns on the first line",
    ),
    ("glue/CoLA/val.tsv", 1, ":1: column 3 has no name; expected the names of the columns on the first line"),
    (
        "glue/RTE/val.tsv",
        1,
        ":2: columns '2', 'Herceptin was already approved to treat …', 'Herceptin can be",
    ),
    (
        "glue/WNLI/val.tsv",
        1,
        ":2: columns '0', 'I stuck a pin through a carrot. When I p…', 'The carrot had a",
    ),
    (
        "truthfulqa/TruthfulQA.csv",
        1,
        ":2: columns 'Type', 'Category', 'Question', 'Best Answer', 'Correct An",
    ),
    (
        "mmlu/test/anatomy_test.csv",
        1,
        ":2: columns 'question', 'choice0', 'choice1', 'choice2', 'choice3', '",
    ),
    ("gsm8k/test.jsonl", 1319, ":1: columns 'question', 'answer' fit no format"),
]


@pytest.mark.parametrize(("name", "layout", "objective", "count"), READ, ids=[r[0] for r in READ])
def test_a_file_is_read_to_its_last_row(
    shared: Callable[[str], Path], name: str, layout: str, objective: Objective, count: int
) -> None:
    file = shared(f"datasets/{name}")
    reading = Reading()
    rows = check_rows(read_rows(file, reading=reading), objective).rows
    assert len(rows) == count
    assert reading.formats == {str(file): layout}
    assert reading.skipped == []


@pytest.mark.parametrize(("name", "count", "reason"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_file_is_refused_for_the_right_reason(
    shared: Callable[[str], Path], name: str, count: int, reason: str
) -> None:
    file = shared(f"datasets/{name}")
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert caught.value.code == "HB202"
    assert f"{count} bad line(s)" in str(caught.value)
    faults = Reading(allowed=10_000)
    if count > 1:
        assert read_rows(file, reading=faults) is not None
        assert any(reason in str(fault) for fault in faults.skipped)
    else:
        assert reason in str(caught.value)


def test_the_words_of_real_pairs_are_all_there(shared: Callable[[str], Path]) -> None:
    file = shared("datasets/preference/dpo_en_demo.json")
    for row, given in zip(read_rows(file), json.loads(file.read_bytes()), strict=True):
        assert row.messages is not None
        assert row.rejected is not None
        words = [turn["value"] for turn in given["conversations"]]
        assert [m.content for m in row.messages] == [*words, given["chosen"]["value"]]
        assert [m.content for m in row.rejected] == [*words, given["rejected"]["value"]]


def test_the_labels_of_real_verdicts_and_classes_are_theirs(shared: Callable[[str], Path]) -> None:
    file = shared("datasets/preference/kto_en_demo.json")
    assert [r.label for r in read_rows(file)] == [given["label"] for given in json.loads(file.read_bytes())]
    file = shared("datasets/glue/RTE/train.tsv")
    with file.open(encoding="utf-8", newline="") as stream:
        given = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    read = [(r.text, r.text_pair, r.label, r.line) for r in read_rows(file)]
    assert read == [(a, b, label, n) for n, (_, a, b, label) in enumerate(given, start=2)]


def test_csv_of_the_world_is_cut_as_the_standard_reader_cuts_it(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    file = shared("datasets/truthfulqa/TruthfulQA.csv")
    renamed = tmp_path / "rows.csv"
    renamed.write_bytes(file.read_bytes().replace(b"Question,Best Answer", b"prompt,completion", 1))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        given = [(row["Question"], row["Best Answer"]) for row in csv.DictReader(stream)]
    assert [tuple(m.content for m in row.messages or ()) for row in read_rows(renamed)] == given
