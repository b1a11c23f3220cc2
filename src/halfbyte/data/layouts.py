"""Columns to rows: which columns make which format, and how a row is taken from them.

It owns the formats people have; it must not know what kind of file a row lies in or what it is used for.

Source: the Alpaca, ShareGPT, preference and KTO formats of LLaMA-Factory's data/README.md; the conversational,
preference and unpaired preference types of TRL's dataset formats; the columns of the GLUE tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from halfbyte.data.faults import BadRowError
from halfbyte.data.row import Message, Row, Turns
from halfbyte.data.tool_calls import tools_in
from halfbyte.data.turns import (
    Json,
    class_of,
    conversation_of,
    history_of,
    messages_of,
    number_of,
    optional_text,
    text_of,
    texts_of,
    truth_of,
    turns_or_text,
)
from halfbyte.data.values import quoted
from halfbyte.settings import DataFormat

# Columns that change what a row means. Where a format does not read them they are refused rather than ignored;
# any other column is ignored.
MEANINGFUL = ("tools", "functions", "tool_calls", "images", "videos", "audios", "history", "system")
EMPTY: tuple[object, ...] = (None, "", [], {}, "[]", "{}")


class Place(NamedTuple):
    """Where a row was found."""

    source: str
    line: int


@dataclass(frozen=True)
class Layout:
    """Columns that make a row of a format.

    Attributes:
        format: The format's name.
        columns: The columns that tell it.
        parse: Takes a row from them.
        reads: Columns that are read too where a row has them.
    """

    format: DataFormat
    columns: tuple[str, ...]
    parse: Callable[[Json, Place], Row]
    reads: tuple[str, ...] = ()

    def row(self, found: Json, place: Place) -> Row:
        """The row these columns make.

        Raises:
            BadRowError: What is wrong with it.
        """
        if odd := [c for c in MEANINGFUL if c not in self.reads and found.get(c) not in EMPTY]:
            raise BadRowError(f"column {quoted(odd)} is not supported and would be lost")
        row = self.parse(found, place)
        tools = tools_in(found.get("tools"), "column 'tools':") if "tools" in self.reads else ()
        if tools and row.style != "chat":
            raise BadRowError("column 'tools': there is no conversation in which they could be called")
        return replace(row, tools=tools) if tools else row


@lru_cache(maxsize=256)
def layout_of(columns: tuple[str, ...], wanted: DataFormat) -> Layout:
    """The layout that a row with these columns has; of two, the one that says more.

    Args:
        columns: Their names.
        wanted: The row's format, or auto for any.

    Raises:
        BadRowError: If it has the columns of none, or of two that have nothing to do with each other.
    """
    eligible = [layout for layout in LAYOUTS if wanted in ("auto", layout.format)]
    fitting = [layout for layout in eligible if all(column in columns for column in layout.columns)]
    telling = [a for a in fitting if not any(set(a.columns) < set(b.columns) for b in fitting)]
    if len(telling) == 1:
        return telling[0]
    if not telling:
        raise BadRowError(_missing(columns, wanted, eligible))
    names = dict.fromkeys(layout.format for layout in telling)
    if len(names) > 1:
        raise BadRowError(f"columns fit {' and '.join(names)}; set data.format to the one that is meant")
    ways = " and ".join(f"({', '.join(layout.columns)})" for layout in telling)
    raise BadRowError(f"columns fit {telling[0].format} in two ways, {ways}; remove one of them")


def _missing(columns: tuple[str, ...], wanted: DataFormat, eligible: list[Layout]) -> str:
    if wanted == "auto":
        firsts = {layout.format: layout.columns for layout in reversed(LAYOUTS)}
        expected = "; ".join(f"{name}: {', '.join(firsts[name])}" for name in reversed(firsts))
        return f"columns {quoted(columns) or 'none'} fit no format ({expected})"
    nearest = min(eligible, key=lambda layout: sum(column not in columns for column in layout.columns))
    lacking = quoted(column for column in nearest.columns if column not in columns)
    got = quoted(columns) or "no column"
    return f"column {lacking} missing for a {wanted} row as in the rest of the file; got {got}"


def _messages(row: Json, place: Place) -> Row:
    return Row(messages_of(row, "messages"), None, *place)


def _sharegpt(row: Json, place: Place) -> Row:
    return Row(_conversation(row), None, *place)


def _prompt_completion(row: Json, place: Place) -> Row:
    prompt, completion = turns_or_text(row, "prompt"), turns_or_text(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Row(_exchange(prompt, completion), None, *place, "completion")
    return Row(_continued(_asked(prompt), completion, "completion"), None, *place)


def _text(row: Json, place: Place) -> Row:
    return Row(None, text_of(row, "text"), *place, "text")


def _alpaca(row: Json, place: Place) -> Row:
    return Row((*_instruction(row), Message("assistant", text_of(row, "output"))), None, *place)


def _preference(row: Json, place: Place) -> Row:
    """A pair of answers to a prompt that is given, or that both begin with."""
    chosen, rejected = turns_or_text(row, "chosen"), turns_or_text(row, "rejected")
    if "messages" in row:
        return _pair(messages_of(row, "messages"), chosen, rejected, place)
    if "conversations" in row:
        return _pair(_conversation(row), chosen, rejected, place)
    if "instruction" in row:
        return _pair(_instruction(row), chosen, rejected, place)
    if "prompt" in row:
        prompt = turns_or_text(row, "prompt")
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            better, worse = _exchange(prompt, chosen), _exchange(prompt, rejected)
            return Row(better, None, *place, "completion", worse)
        return _pair(_asked(prompt), chosen, rejected, place)
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = _shared_beginning(chosen, rejected).removesuffix(" ")
        if prompt:
            better, worse = (_exchange(prompt, answer[len(prompt) :]) for answer in (chosen, rejected))
            return Row(better, None, *place, "completion", worse)
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple) and chosen[0] == rejected[0]:
        return Row(chosen, None, *place, "chat", rejected)
    raise BadRowError("'chosen' and 'rejected' do not begin alike, and no column holds their prompt")


def _kto(row: Json, place: Place) -> Row:
    label = truth_of(row, "label")
    if "messages" in row:
        return Row(messages_of(row, "messages"), None, *place, label=label)
    if "conversations" in row:
        return Row(_conversation(row), None, *place, label=label)
    judged = (_alpaca if "instruction" in row else _prompt_completion)(row, place)
    return Row(judged.messages, None, *place, judged.style, label=label)


def _classified(*columns: str) -> Callable[[Json, Place], Row]:
    """Rows whose one or two texts stand in these columns."""

    def parse(row: Json, place: Place) -> Row:
        first, *second = [text_of(row, column) for column in columns]
        pair = second[0] if second else None
        return Row(None, first, *place, "text", label=class_of(row, "label"), text_pair=pair)

    return parse


def _tagged(column: str) -> Callable[[Json, Place], Row]:
    """Rows of words with a tag each."""

    def parse(row: Json, place: Place) -> Row:
        words, tags = texts_of(row, "tokens"), texts_of(row, column)
        if len(words) != len(tags):
            raise BadRowError(f"{len(words)} tokens with {len(tags)} tags")
        if not words:
            raise BadRowError("column 'tokens': it is empty")
        if blank := [at for at, word in enumerate(words, 1) if not word.strip()]:
            raise BadRowError(f"column 'tokens': entry {blank[0]} is blank")
        return Row(None, " ".join(words), *place, "text", tags=tuple(zip(words, tags, strict=True)))

    return parse


def _alike(row: Json, place: Place) -> Row:
    negative = text_of(row, "negative") if "negative" in row else None
    first, second = text_of(row, "anchor"), text_of(row, "positive")
    return Row(None, first, *place, "text", text_pair=second, negative=negative)


def _scored(first: str, second: str) -> Callable[[Json, Place], Row]:
    """Rows of two texts and how alike they are."""

    def parse(row: Json, place: Place) -> Row:
        texts = text_of(row, first), text_of(row, second)
        return Row(None, texts[0], *place, "text", text_pair=texts[1], score=number_of(row, "score"))

    return parse


def _conversation(row: Json) -> Turns:
    """ShareGPT's turns, behind the system message that may stand in a column of its own."""
    turns = conversation_of(row, "conversations")
    system = _system(row)
    if system and turns[0].role == "system":
        raise BadRowError("column 'system' is filled, and the conversation begins with a system message too")
    return system + turns


def _instruction(row: Json) -> Turns:
    """Alpaca's prompt: system message, earlier exchanges, and the instruction with its input below it."""
    given = optional_text(row, "input")
    instruction = text_of(row, "instruction")
    asked = Message("user", f"{instruction}\n\n{given}" if given else instruction)
    return (*_system(row), *history_of(row, "history"), asked)


def _system(row: Json) -> Turns:
    words = optional_text(row, "system")
    return (Message("system", words),) if words else ()


def _exchange(prompt: str, answer: str) -> Turns:
    return Message("user", prompt), Message("assistant", answer)


def _shared_beginning(a: str, b: str) -> str:
    length = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _asked(prompt: Turns | str) -> Turns:
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _pair(prompt: Turns, chosen: Turns | str, rejected: Turns | str, place: Place) -> Row:
    better, worse = _continued(prompt, chosen, "chosen"), _continued(prompt, rejected, "rejected")
    return Row(better, None, *place, "chat", worse)


def _continued(prompt: Turns, answer: Turns | str, column: str) -> Turns:
    """A prompt with an answer that continues it, or that repeats it first, as UltraFeedback's do."""
    if isinstance(answer, str):
        return (*prompt, Message("assistant", answer))
    if answer[: len(prompt)] == prompt:
        return answer
    if answer[0].role != "assistant":
        what = "neither repeats the prompt nor goes on with the assistant's turn"
        raise BadRowError(f"column {column!r}: begins with the {answer[0].role}: it {what}")
    return prompt + answer


_TOOLS = ("tools",)
_CHAT = ("system", "tools")
_ALPACA = ("input", "system", "history")

LAYOUTS: tuple[Layout, ...] = (
    Layout("messages", ("messages",), _messages, _TOOLS),
    Layout("sharegpt", ("conversations",), _sharegpt, _CHAT),
    Layout("prompt_completion", ("prompt", "completion"), _prompt_completion, _TOOLS),
    Layout("text", ("text",), _text),
    Layout("alpaca", ("instruction", "output"), _alpaca, _ALPACA),
    Layout("preference", ("prompt", "chosen", "rejected"), _preference, _TOOLS),
    Layout("preference", ("chosen", "rejected"), _preference, _TOOLS),
    Layout("preference", ("messages", "chosen", "rejected"), _preference, _TOOLS),
    Layout("preference", ("conversations", "chosen", "rejected"), _preference, _CHAT),
    Layout("preference", ("instruction", "chosen", "rejected"), _preference, _ALPACA),
    Layout("kto", ("prompt", "completion", "label"), _kto, _TOOLS),
    Layout("kto", ("messages", "label"), _kto, _TOOLS),
    Layout("kto", ("conversations", "label"), _kto, _CHAT),
    Layout("kto", ("instruction", "output", "label"), _kto, _ALPACA),
    Layout("classification", ("text", "label"), _classified("text")),
    Layout("classification", ("text", "text_pair", "label"), _classified("text", "text_pair")),
    Layout("classification", ("sentence", "label"), _classified("sentence")),
    Layout("classification", ("sentence1", "sentence2", "label"), _classified("sentence1", "sentence2")),
    Layout("classification", ("premise", "hypothesis", "label"), _classified("premise", "hypothesis")),
    Layout("classification", ("question", "sentence", "label"), _classified("question", "sentence")),
    Layout("classification", ("question1", "question2", "label"), _classified("question1", "question2")),
    Layout("tagging", ("tokens", "tags"), _tagged("tags")),
    Layout("tagging", ("tokens", "ner_tags"), _tagged("ner_tags")),
    Layout("similarity", ("anchor", "positive"), _alike, ("negative",)),
    Layout("similarity", ("text", "text_pair", "score"), _scored("text", "text_pair")),
    Layout("similarity", ("sentence1", "sentence2", "score"), _scored("sentence1", "sentence2")),
)
