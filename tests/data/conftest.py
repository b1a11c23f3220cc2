"""What the data tests share: real tokenizers, chat templates as makers write them, rows made in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.row import Message, Row
from halfbyte.data.tokenizer import load_tokenizer

CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant here') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizers(shared: Callable[[str], Path]) -> Callable[[str], Any]:
    """Loads a tokenizer of the shared models, once."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = load_tokenizer(shared(f"models/{name}"))
        return loaded[name]

    return get


@pytest.fixture
def templated(tokenizers: Callable[[str], Any]) -> Callable[[str, str], Any]:
    """A copy of a tokenizer with a chat template of its own: `chatml`, `llama2` or a template's text."""
    known = {"chatml": CHATML_TEMPLATE, "llama2": LLAMA2_TEMPLATE}

    def make(name: str, template: str) -> Any:
        tokenizer = copy.deepcopy(tokenizers(name))
        tokenizer.chat_template = known.get(template, template)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chat() -> Callable[..., Row]:
    """A conversation from its contents: user and assistant in turn, after an optional system message."""

    def make(*contents: str, system: str | None = None, line: int = 1) -> Row:
        turns = [] if system is None else [Message("system", system)]
        for number, content in enumerate(contents):
            turns.append(Message("assistant" if number % 2 else "user", content))
        return Row(tuple(turns), None, "rows.jsonl", line)

    return make


@pytest.fixture(scope="session")
def completion() -> Callable[[str, str], Row]:
    """A prompt with its completion."""

    def make(prompt: str, answer: str) -> Row:
        return Row(
            (Message("user", prompt), Message("assistant", answer)), None, "rows.jsonl", 1, "completion"
        )

    return make
