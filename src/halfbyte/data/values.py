"""Single values of a row: their types in words, and the texts among them that no tokenizer takes.

It owns how one plain value is judged and named; it must not know turns, tools or columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from halfbyte.data.faults import BadRowError
from halfbyte.data.parquet_rows import UntakenValue

LONGEST_NAME = 40  # of a table without a heading, whole texts stand where names belong


def kind(value: object) -> str:
    """A value's type in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, UntakenValue):
        return f"Parquet's {value.type}"
    names = {str: "text", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, parted by commas, each no longer than a name is."""
    return ", ".join(repr(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…") for name in names)


def refuse_odd_characters(value: object, place: str) -> None:
    """Refuse texts, keys among them, with characters that no tokenizer takes, however deep they lie.

    Raises:
        BadRowError: NUL, or half a surrogate pair.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            refuse_odd_characters(key, place)
            refuse_odd_characters(inner, place)
    elif isinstance(value, list):
        for inner in value:
            refuse_odd_characters(inner, place)
    elif isinstance(value, str):
        if "\0" in value:
            raise BadRowError(f"{place}: NUL character at {value.index(chr(0)) + 1}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(f"{place}: half a surrogate pair at character {error.start + 1}") from None
