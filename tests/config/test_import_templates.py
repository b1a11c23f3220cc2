"""Promises of `halfbyte config import` about chat formats: a name becomes ours where both write the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.data.templates import FORMATS
from halfbyte.foreign import axolotl, llama_factory
from halfbyte.foreign.importing import import_file

RECIPES = {
    "chat_template": "base_model: m\nmicro_batch_size: 1\n",
    "template": "model_name_or_path: m\nstage: sft\nlora_target: all\n",
}


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        *(("chat_template", theirs, ours) for theirs, ours in axolotl.CHAT_FORMATS.items()),
        *(("template", theirs, ours) for theirs, ours in llama_factory.CHAT_FORMATS.items()),
    ],
)
def test_a_chat_format_that_both_know_is_named(tmp_path: Path, key: str, theirs: str, ours: str) -> None:
    assert ours in {*FORMATS, "tokenizer"}
    file = tmp_path / "theirs.yaml"
    file.write_text(f"{RECIPES[key]}{key}: {theirs}\n", encoding="utf-8")
    imported = import_file(file)
    line = imported.lines["data.template"]
    assert (line.value, line.sources) == (ours, (key,))
    assert not [note for note in imported.notes if theirs in note]


@pytest.mark.parametrize(
    ("key", "theirs"),
    [
        ("chat_template", "cohere"),
        ("chat_template", "mistral_v3_tekken"),  # without blanks between tokens and text
        ("template", "zephyr"),  # with a system message of its own
        ("template", "qwen3"),  # with empty thoughts
        ("template", "vicuna"),
    ],
)
def test_any_other_is_left_to_the_model_and_said(tmp_path: Path, key: str, theirs: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(f"{RECIPES[key]}{key}: {theirs}\n", encoding="utf-8")
    imported = import_file(file)
    assert imported.lines["data.template"].value == "auto"
    assert [note for note in imported.notes if f"{key} {theirs}: the model's own template" in note]
