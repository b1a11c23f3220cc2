"""Promises of tagging: the first token of each word has its class, a run learns them, an adapter brings them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.evaluate.test_confusion import f1_by_definition

from halfbyte.data.encoder_texts import encode_words
from halfbyte.data.pack import UNTRAINED
from halfbyte.data.read import read_rows
from halfbyte.data.row import Row
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import DataError, EvaluateError
from halfbyte.evaluate.tagged import Tagged, measured_tags
from halfbyte.pipeline import evaluate, run
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare

Make = Callable[..., Config]
COLOURS, ANIMALS = ("red", "green", "blue", "yellow"), ("horse", "rabbit", "goat", "sheep")


def rows() -> str:
    """64 sentences in which colours and animals are tagged."""
    found: list[dict[str, Any]] = []
    for colour in COLOURS:
        for animal in ANIMALS:
            for words in (
                ["the", colour, animal, "sleeps"],
                [animal, "and", "a", colour, "door"],
                ["no", animal, "here"],
                ["paint", "it", colour],
            ):
                tags = ["C" if w in COLOURS else "A" if w in ANIMALS else "O" for w in words]
                found.append({"tokens": [*words, f"{colour}-{animal}"], "tags": [*tags, "O"]})
    return "\n".join(map(json.dumps, found)) + "\n"


def tagged(*words: tuple[str, str]) -> Row:
    return Row(None, " ".join(word for word, _ in words), "rows", 1, "text", tags=words)


def test_the_first_token_of_a_word_has_its_class_and_no_other(shared: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(shared("models/all-MiniLM-L6-v2-fp16"))
    row = tagged(("Unbelievably", "x"), ("good", "y"), (",", "x"), ("Schrödingers", "y"))
    (found,) = encode_words([row], ("x", "y"), tokenizer, 32)
    pieces = tokenizer.convert_ids_to_tokens(found.input_ids.tolist())
    assert found.targets is not None
    first = [p for p, t in zip(pieces, found.targets, strict=True) if t != UNTRAINED]
    assert not any(piece.startswith("##") or piece in ("[CLS]", "[SEP]") for piece in first)
    assert found.targets[found.targets != UNTRAINED].tolist() == [0, 1, 0, 1]
    assert len(pieces) > 6
    assert np.array_equal(found.trained, found.targets != UNTRAINED)
    assert not found.truncated
    (cut,) = encode_words([row], ("x", "y"), tokenizer, 6)
    assert cut.truncated
    assert len(cut.input_ids) == 6
    with pytest.raises(DataError, match=r"HB233[\s\S]*rows:1"):
        encode_words([tagged(("\u200b", "x"))], ("x", "y"), tokenizer, 32)


def test_rows_of_words_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"tokens": ["a", "b"], "ner_tags": [0, 3]}) + "\n")
    (row,) = read_rows([str(file)], "auto")
    assert row.tags == (("a", "0"), ("b", "3"))
    assert row.objective == "tagging"
    for bad, fault in (
        ({"tokens": ["a"], "tags": ["x", "y"]}, "1 tokens with 2 tags"),
        ({"tokens": [], "tags": []}, "it is empty"),
        ({"tokens": ["a", " "], "tags": ["x", "y"]}, "entry 2 is blank"),
        ({"tokens": "a b", "tags": ["x"]}, "got text, expected an array"),
        ({"tokens": ["a", None], "tags": ["x", "y"]}, "expected text"),
    ):
        file.write_text(json.dumps(bad) + "\n")
        with pytest.raises(DataError, match=fault):
            read_rows([str(file)], "auto")


def test_rows_that_differ_in_their_tags_are_other_rows() -> None:
    assert tagged(("a", "x")).id != tagged(("a", "y")).id
    assert tagged(("a", "x")).id == tagged(("a", "x")).id


def test_metrics_are_counted_over_words_and_drawn_over_rows() -> None:
    sure = np.log(np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]))
    found = measured_tags(
        [
            Tagged("one", "rows:1", sure, np.array([0, 1, 1])),
            Tagged("two", "rows:2", sure[:1], np.array([1])),
        ],
        ("x", "y"),
        resamples=200,
    )
    values = {m.name: m.interval for m in found.metrics}
    assert values["tag_accuracy"].value == pytest.approx(2 / 4)
    assert values["tag_accuracy"].n == values["macro_f1"].n == 2
    assert values["macro_f1"].value == pytest.approx(f1_by_definition([0, 1, 1, 1], [0, 1, 0, 0]))
    assert values["label_loss"].value == pytest.approx(-np.log([0.8, 0.7, 0.4, 0.2]).mean())
    same = found.metrics[1].difference(found.metrics[1], resamples=100, seed=0)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(EvaluateError, match=r"HB610[\s\S]*rows:9"):
        measured_tags([Tagged("one", "rows:9", sure * np.nan, np.array([0, 1, 1]))], ("x", "y"))


def test_a_run_learns_tags_and_its_adapter_says_them_again(make: Make) -> None:
    config = make("tag", rows(), "train.learning_rate=0.003", "train.eval_steps=6", "train.keep=best")
    result = run(config)
    summary = json.loads((result.folder / "summary.json").read_text())["metrics"]
    assert summary["tag_accuracy"]["after"]["value"] > 0.9 > summary["tag_accuracy"]["before"]["value"]
    assert json.loads((result.result / "labels.json").read_text()) == {"labels": ["A", "C", "O"]}
    few = [json.dumps({"tokens": ["no", "goat", "today"], "tags": ["O", "A", "O"]})]
    alone = make("tag", rows(), held_out="\n".join(few))
    found = {m.name: m.interval.value for m in evaluate(alone, result.result).metrics}
    assert found["tag_accuracy"] == 1.0  # numbered by this row alone, O would be the adapter's C
    odd = make("tag", rows(), held_out=json.dumps({"tokens": ["x"], "tags": ["B"]}))
    with pytest.raises(DataError, match=r"HB232[\s\S]*eval.jsonl:1: 'B'"):
        evaluate(odd, result.result)
    with pytest.raises(DataError, match="HB232"):
        prepare(odd)
