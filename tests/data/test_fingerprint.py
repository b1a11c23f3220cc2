"""Fingerprints: the same for the same text and ids however they are stored, another for any other."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, processors

from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.render import Renderer
from halfbyte.data.tokenizer import load_tokenizer

Tokenizers = Callable[[str], Any]
VOCABULARIES = ("base-11m", "llama2-tokenizer", "stories260K-hf")


def of(tokenizer: Any, template: Any = "auto") -> Fingerprint:
    return Fingerprint.of(Renderer(tokenizer, template))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_what_changes_no_text_and_no_id_changes_nothing(
    tokenizers: Tokenizers, tmp_path: Path, name: str
) -> None:
    tokenizer = copy.deepcopy(tokenizers(name))
    before = of(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert of(load_tokenizer(tmp_path)) == before, "saved and loaded"
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer("a b c d", truncation=True, max_length=2, padding="max_length")
    assert of(tokenizer) == before, "padding and truncation"


def test_it_is_the_same_in_another_process(tokenizers: Tokenizers, shared: Callable[[str], Path]) -> None:
    code = (
        "import sys; from halfbyte.data.fingerprint import Fingerprint; from halfbyte.data.render import Renderer;"
        "from halfbyte.data.tokenizer import load_tokenizer;"
        "print(Fingerprint.of(Renderer(load_tokenizer(sys.argv[1]), 'llama2')))"
    )
    command = [sys.executable, "-c", code, str(shared("models/llama2-tokenizer"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(of(tokenizers("llama2-tokenizer"), "llama2"))


def _another_template(tokenizer: Any) -> None:
    tokenizer.chat_template += " "


def _a_token_more(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})


def _another_end(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_end|>"


def _lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _a_token_before(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_another_template, ["the text of the chat format tokenizer is another"]),
        (_a_token_more, ["the tokenizer is another"]),
        (_another_end, ["the tokenizer is another"]),
        (_lower_case, ["the tokenizer is another"]),
        (_a_token_before, ["the tokenizer is another"]),
    ],
)
def test_what_changes_text_or_ids_is_told(
    templated: Callable[[str, str], Any], change: Callable[[Any], None], told: list[str]
) -> None:
    tokenizer = templated("base-11m", "chatml")
    before = of(tokenizer)
    change(tokenizer)
    assert before.differences(of(tokenizer)) == told


def test_every_format_is_told_from_every_other(templated: Callable[[str, str], Any]) -> None:
    tokenizer = templated("base-11m", "chatml")
    found = [of(tokenizer, template) for template in ("tokenizer", "chatml", "qwen2", "plain")]
    assert len({fingerprint.template for fingerprint in found}) == 4
    assert found[0].differences(found[1]) == ["the chat format is chatml, not tokenizer"]
    assert found[1].differences(found[1]) == []


def test_it_is_written_and_read_back(tokenizers: Tokenizers) -> None:
    fingerprint = of(tokenizers("base-11m"))
    assert Fingerprint.parse(fingerprint.as_dict()) == fingerprint
    for broken in ({}, {"fingerprint": 1}, {"fingerprint": {"chat_format": "plain", "template": "a"}}):
        assert Fingerprint.parse(broken) is None
