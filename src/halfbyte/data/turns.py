"""Cells as texts, turns of a conversation and labels, or what is wrong with them.

It owns how one value is judged; it must not know which columns make a row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping

from halfbyte.data.faults import BadRowError
from halfbyte.data.row import ROLES, Message, Role, Turns
from halfbyte.data.tool_calls import calls_in
from halfbyte.data.values import kind, quoted, refuse_odd_characters
from halfbyte.errors import nearest_name

Json = Mapping[str, object]

ROLES_ELSEWHERE: dict[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
}
"""What ShareGPT and its kin call the roles."""

CALLER = "function_call"
"""Whose turn ShareGPT says it is where the assistant's words are calls of tools, as JSON text."""

OF_ROLE: Mapping[str, tuple[str, ...]] = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}
"""What a turn of some role may hold besides its content."""

NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
"""A whole number as it is written without padding."""


def text_of(row: Json, column: str, place: str = "column") -> str:
    """A text cell, without characters that no tokenizer takes."""
    value = row[column]
    if not isinstance(value, str):
        raise BadRowError(f"{place} {column!r}: got {kind(value)}, expected text")
    refuse_odd_characters(value, f"{place} {column!r}")
    return value


def texts_of(row: Json, column: str) -> list[str]:
    """An array of texts; numbers stand for their names."""
    values = row[column]
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError:
            raise BadRowError(f"column {column!r}: got text, expected an array") from None
    if not isinstance(values, list):
        raise BadRowError(f"column {column!r}: got {kind(values)}, expected an array")
    named = [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
    return [text_of({column: value}, column, f"entry {at} of column") for at, value in enumerate(named, 1)]


def number_of(row: Json, column: str) -> float:
    """A finite number, also as text."""
    value = row[column]
    try:
        number = (
            float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
        )
    except ValueError:
        number = None
    if number is None or not math.isfinite(number):
        raise BadRowError(f"column {column!r}: got {kind(value)}, expected a number")
    return number


def optional_text(row: Json, column: str) -> str:
    """A text cell that may be missing or null, which both mean an empty text."""
    return text_of(row, column) if row.get(column) is not None else ""


def messages_of(row: Json, column: str) -> Turns:
    """Turns keyed `role` and `content`, with our names of the roles."""
    return tuple(
        _turn(turn, f"message {number}:", sharegpt=False)
        for number, turn in enumerate(_array(row, column), start=1)
    )


def conversation_of(row: Json, column: str) -> Turns:
    """Turns keyed `from` and `value`, or `role` and `content`, with ShareGPT's or our names of the roles."""
    return tuple(
        _turn(turn, f"{column!r} turn {number}:", sharegpt=True)
        for number, turn in enumerate(_array(row, column), start=1)
    )


def turns_or_text(row: Json, column: str) -> Turns | str:
    """A cell that is a text, one turn, or several."""
    value = row[column]
    if isinstance(value, list):
        return conversation_of(row, column)
    if isinstance(value, dict):
        return (_turn(value, f"column {column!r}:", sharegpt=True),)
    return text_of(row, column)


def _array(row: Json, column: str) -> list[object]:
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        got = "an empty array" if turns == [] else kind(turns)
        raise BadRowError(f"column {column!r}: got {got}, expected messages")
    return turns


def _turn(turn: object, place: str, *, sharegpt: bool) -> Message:
    if not isinstance(turn, dict):
        raise BadRowError(f"{place} got {kind(turn)}, expected an object with role and content")
    # Parquet gives every turn the keys of all; where a turn lacks one, its value is null.
    given = {key: value for key, value in turn.items() if value is not None or key in ("role", "content")}
    speaker, words = ("from", "value") if sharegpt and "role" not in given else ("role", "content")
    if sharegpt and given.get(speaker) == CALLER and set(given) == {speaker, words}:
        return Message("assistant", "", calls_in(text_of(given, words, place), place))
    role = _role_of(given, speaker, place, sharegpt=sharegpt) if speaker in given else None
    calls = calls_in(given["tool_calls"], place) if role == "assistant" and given.get("tool_calls") else ()
    needed = {speaker} if calls else {speaker, words}
    if role is None or not needed <= set(given) <= {speaker, words, *OF_ROLE.get(role, ())}:
        raise BadRowError(f"{place} got keys {quoted(turn) or 'none'}, expected {speaker} and {words} alone")
    content = "" if calls and given.get(words) is None else text_of(given, words, place)
    name, call_id = (text_of(given, key, place) if key in given else None for key in ("name", "tool_call_id"))
    return Message(role, content, calls, name, call_id)


def _role_of(turn: Json, speaker: str, place: str, *, sharegpt: bool) -> Role:
    """Who speaks in a turn, by our name."""
    given = text_of(turn, speaker, place)
    known = ROLES_ELSEWHERE.get(given.lower())
    if sharegpt and known:
        return known
    for role in ROLES:
        if given == role:
            return role
    near = known or nearest_name(given.lower(), ROLES)
    hint = f"; did you mean {near!r}?" if near else ""
    raise BadRowError(f"{place} unknown role {given!r}, expected {', '.join(ROLES)}{hint}")


def history_of(row: Json, column: str) -> Turns:
    """Earlier exchanges, each a pair of a question and its answer, as LLaMA-Factory has them."""
    history = row.get(column)
    turns: list[Message] = []
    for pair in [] if history is None else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError(f"column {column!r}: got {kind(pair)}, expected pairs of question and answer")
        for role, words in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(_role(role), text_of({role: words}, role, f"column {column!r}:")))
    return tuple(turns)


def _role(name: str) -> Role:
    return "user" if name == "user" else "assistant"


def truth_of(row: Json, column: str) -> bool:
    """A verdict on an answer: true or false; a text file has only the words for it."""
    value = row[column]
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    got = repr(value) if isinstance(value, (str, int)) else kind(value)
    expected = "expected true or false; where it is no verdict on the answer, set data.format"
    raise BadRowError(f"column {column!r}: got {got}, {expected}")


def class_of(row: Json, column: str) -> int | str:
    """A class by its name or number; a number is the same one however it is written."""
    value = row[column]
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise BadRowError(
                f"column {column!r}: got {value}, expected a class from 0; -1 is a hidden label"
            )
        return value
    if isinstance(value, str) and value.strip():
        return text_of(row, column)
    got = "blank text" if isinstance(value, str) else kind(value)
    raise BadRowError(f"column {column!r}: got {got}, expected a class by name or number")
