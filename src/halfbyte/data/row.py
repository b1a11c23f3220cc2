"""A row: what one line of a file gives a model to learn from, whatever file and columns it came from.

It owns the types of a row and its content hash; it must not know files, columns, templates or tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Json = dict[str, object]
Role = Literal["system", "user", "assistant", "tool"]
Style = Literal["chat", "completion", "text"]
Objective = Literal["sft", "preference", "kto", "classification", "tagging", "similarity"]
OBJECTIVES: Mapping[str, Objective] = {
    "sft": "sft",
    **dict.fromkeys(("dpo", "simpo", "orpo"), "preference"),
    "kto": "kto",
    "classify": "classification",
    "tag": "tagging",
    "embed": "similarity",
}
"""What each task learns from its rows of words."""

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said, verbatim.
        tool_calls: Tools the assistant calls, as JSON objects in the form that chat templates take.
        name: Which tool returned the content; of a tool's turn.
        tool_call_id: Which call it was returned to; of a tool's turn.
    """

    role: Role
    content: str
    tool_calls: tuple[Json, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def tool_facts(self) -> Json:
        """All that it says of tools besides its content; nothing where there is none."""
        found = {"tool_calls": list(self.tool_calls), "name": self.name, "tool_call_id": self.tool_call_id}
        return {key: value for key, value in found.items() if value not in (None, [])}


Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Row:
    """One thing to learn from: a conversation, a prompt with its completion, or a text; judged or not.

    Attributes:
        messages: The turns; None for a text. A prompt with its completion is a user and an assistant turn.
        text: The text; None for the others.
        source: File the row was read from.
        line: Line in it on which the row begins, from 1; of a .parquet file the number of the row.
        style: How it is to be written out: `chat` through a template, `completion` as prompt and completion
            joined, `text` as it is.
        rejected: The conversation with the worse answer, prompt included; `messages` is then the one with the better.
        label: Whether the answer is a good one, or the class of the text: its name or its number from 0.
        text_pair: The second of two texts that are classified together.
        tools: Tools the assistant may call, as JSON schemas of functions.
        tags: The class of each of the text's words, with the word; none for other rows.
        negative: A text that is unlike `text`, while `text_pair` is like it; or None.
        score: How alike the two texts are; None where they simply are.
    """

    messages: Turns | None
    text: str | None
    source: str
    line: int
    style: Style = "chat"
    rejected: Turns | None = None
    label: bool | int | str | None = None
    text_pair: str | None = None
    tools: tuple[Json, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    negative: str | None = None
    score: float | None = None

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @property
    def objective(self) -> Objective:
        """What it can teach: words to write (sft), which answer is better, whether one is good, a class, classes of
        words, or which texts are alike."""
        if self.rejected is not None:
            return "preference"
        if self.tags:
            return "tagging"
        if self.label is None and self.text_pair is not None:
            return "similarity"
        if self.label is None:
            return "sft"
        return "classification" if self.messages is None else "kto"

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of its words, roles, tools and judgement, wherever it stands."""
        words: object = self.text if self.messages is None else _plain(self.messages)
        if self.objective != "sft":
            words = {
                "words": words,
                "rejected": None if self.rejected is None else _plain(self.rejected),
                "label": self.label,
                "text_pair": self.text_pair,
            }
        beside = {"tags": self.tags, "negative": self.negative, "score": self.score}
        if isinstance(words, dict):
            words |= {name: value for name, value in beside.items() if value not in (None, ())}
        if self.tools:
            words = {"tools": self.tools, "words": words}
        canonical = json.dumps(words, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _plain(turns: Turns) -> list[list[object]]:
    return [[m.role, m.content, *([m.tool_facts] if m.tool_facts else [])] for m in turns]
