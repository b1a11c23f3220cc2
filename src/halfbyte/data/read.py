"""Files of rows to typed rows: JSON Lines and JSON in four column layouts, every fault named by line.

It owns what a line may look like; it must not know templates, tokens or what a row is used for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn, cast, get_args

from halfbyte.config import nearest_name
from halfbyte.errors import DataError, listed
from halfbyte.settings import DataFormat

Role = Literal["system", "user", "assistant"]
Style = Literal["chat", "completion", "text"]
Json = dict[str, object]

ROLES: tuple[Role, ...] = get_args(Role)
ROLES_ELSEWHERE = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
# Columns that change what a row means. They are refused rather than ignored; any other column is ignored.
UNSUPPORTED_COLUMNS = ("tools", "functions", "tool_calls", "images", "history", "system")
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said, verbatim.
    """

    role: Role
    content: str


@dataclass(frozen=True)
class Row:
    """One thing to learn from: a conversation, a prompt with its completion, or a text.

    Attributes:
        messages: The turns; None for a text. A prompt with its completion is a user and an assistant turn.
        text: The text; None for the others.
        source: File the row was read from.
        line: Line in it on which the row begins, from 1.
        style: How it is to be written out: `chat` through a template, `completion` as prompt and completion
            joined, `text` as it is.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    source: str
    line: int
    style: Style = "chat"

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the SHA-256 of the row's words and roles, whatever its place and style."""
        words = self.text if self.messages is None else [[m.role, m.content] for m in self.messages]
        canonical = json.dumps(words, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def read_rows(paths: str | Path | Sequence[str | Path], format: DataFormat = "auto") -> list[Row]:  # noqa: A002
    """Read all rows of some files, in order.

    A `.jsonl` file has one object per line (blank lines only at its end), a `.json` file one array of them.

    Args:
        paths: File or files.
        format: Column layout; auto takes, per file, the layout of its first row that has one.

    Raises:
        DataError: HB201 names every file that cannot be read; HB202 every bad line of every file.
    """
    files = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    faults = [f"{file}: {reason}" for file in files if (reason := _unreadable(file))]
    if faults or not files:
        what = f"{len(faults)} file(s)" + listed(faults) if files else "no file is named"
        raise DataError("HB201", what, fix="name existing .jsonl or .json files")
    rows: list[Row] = []
    for file in files:
        found, bad = _FileReader(file, format).read()
        rows += found
        faults += bad
    if faults:
        fix = "mend or remove these lines; nothing was read"
        raise DataError("HB202", f"{len(faults)} bad line(s)" + listed(faults), fix=fix)
    return rows


def _unreadable(file: Path) -> str:
    """Why a file cannot be read, or an empty text."""
    if not file.exists():
        return "does not exist"
    if not file.is_file():
        return "is not a file"
    if file.suffix not in SUFFIXES:
        return f"ends in {file.suffix or 'nothing'!r}, expected {' or '.join(SUFFIXES)}"
    try:
        with file.open("rb"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


class _BadLineError(Exception):
    """What is wrong with a line."""


class _FileReader:
    """Reads one file into rows and faults."""

    def __init__(self, file: Path, layout: DataFormat) -> None:
        self.file = file
        self.layout = layout
        self.rows: list[Row] = []
        self.faults: list[str] = []

    def read(self) -> tuple[list[Row], list[str]]:
        content = self.file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        objects = _json_lines(content) if self.file.suffix == ".jsonl" else _json_array(content)
        for line, found in objects:
            try:
                if isinstance(found, _BadLineError):
                    raise found
                self.rows.append(self._row(found, line))
            except _BadLineError as bad:
                self.faults.append(f"{self.file}:{line}: {bad}")
        if not self.rows and not self.faults:
            self.faults.append(f"{self.file}:1: the file holds no rows")
        return self.rows, self.faults

    def _row(self, found: object, line: int) -> Row:
        if not isinstance(found, dict):
            raise _BadLineError(f"got {_kind(found)}, expected an object")
        if self.layout == "auto":
            self.layout = _detect(found)
        layout = LAYOUTS[self.layout]
        if missing := [column for column in layout.columns if column not in found]:
            raise _BadLineError(
                f"column {_names(missing)} missing for a {self.layout} row as in the rest of the file; "
                f"got {_names(found) or 'no column'}"
            )
        if odd := [column for column in UNSUPPORTED_COLUMNS if found.get(column)]:
            raise _BadLineError(f"column {_names(odd)} is not supported and would be lost")
        messages, text = layout.parse(found)
        return Row(messages, text, str(self.file), line, layout.style)


def _json_lines(content: bytes) -> Iterator[tuple[int, object | _BadLineError]]:
    """Line number and object, or what is wrong with the line."""
    for number, line in enumerate(content.rstrip().split(b"\n") if content.strip() else (), start=1):
        try:
            yield number, _parse(line)
        except _BadLineError as bad:
            yield number, bad


def _parse(line: bytes) -> object:
    if not line.strip():
        raise _BadLineError("empty line")
    text = _decode(line)
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(_json_reason(error)) from None


def _json_array(content: bytes) -> Iterator[tuple[int, object | _BadLineError]]:
    """Line number and object of each element; reading ends at the first place that is not JSON."""
    line, at = 1, 0
    try:
        text = _decode(content)
        at = _skip_blank(text, 0)
        if text[at : at + 1] != "[":
            raise _BadLineError("expected a JSON array of objects" + _jsonl_hint(text, at))
        at = _skip_blank(text, at + 1)
        line += text.count("\n", 0, at)
        while text[at : at + 1] != "]":
            found, end = _element(text, at)
            yield line, found
            start, at = at, _skip_blank(text, end)
            if text[at : at + 1] == ",":
                at = _skip_blank(text, at + 1)
                if text[at : at + 1] == "]":
                    raise _BadLineError("a comma before the closing bracket")
            elif text[at : at + 1] != "]":
                raise _BadLineError("expected a comma or the closing bracket after this object")
            line += text.count("\n", start, at)
        if _skip_blank(text, at + 1) != len(text):
            raise _BadLineError("something follows the array")
    except _BadLineError as bad:
        yield line, bad
    except json.JSONDecodeError as error:
        yield error.lineno, _BadLineError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        yield line, _BadLineError(_json_reason(error))


def _element(text: str, at: int) -> tuple[object | _BadLineError, int]:
    """An array's element and its end; one that is JSON but refused is passed over."""
    try:
        return DECODER.raw_decode(text, at)
    except _BadLineError as bad:
        return bad, json.JSONDecoder().raw_decode(text, at)[1]


def _jsonl_hint(text: str, at: int) -> str:
    return "; rows one to a line belong in a .jsonl file" if text[at : at + 1] == "{" else ""


def _skip_blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _decode(content: bytes) -> str:
    if (nul := content.find(b"\0")) >= 0:
        raise _BadLineError(f"NUL byte at byte {nul + 1}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLineError(f"not UTF-8 at byte {error.start + 1}: {error.reason}") from None


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {error}"


def _unique_keys(pairs: list[tuple[str, object]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _BadLineError(
            f"key {_names(k for k in found if keys.count(k) > 1)} is given twice in one object"
        )
    return found


def _no_constant(name: str) -> NoReturn:
    raise _BadLineError(f"not JSON: {name} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _detect(row: Json) -> DataFormat:
    """The one layout whose columns a row has."""
    fitting = [name for name, layout in LAYOUTS.items() if all(column in row for column in layout.columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise _BadLineError(f"columns fit {' and '.join(fitting)}; set data.format to the one that is meant")
    hint = "; ShareGPT's conversations: rename to messages, from to role, value to content" * (
        "conversations" in row
    )
    expected = "; ".join(f"{name}: {', '.join(layout.columns)}" for name, layout in LAYOUTS.items())
    raise _BadLineError(f"columns {_names(row) or 'none'} fit no format ({expected}){hint}")


def _string(row: Json, column: str, place: str = "column") -> str:
    """A text cell without characters that no tokenizer takes."""
    value = row[column]
    if not isinstance(value, str):
        raise _BadLineError(f"{place} {column!r}: got {_kind(value)}, expected text")
    if "\0" in value:
        raise _BadLineError(f"{place} {column!r}: NUL character at {value.index(chr(0)) + 1}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadLineError(
            f"{place} {column!r}: half a surrogate pair at character {error.start + 1}"
        ) from None
    return value


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "text", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names[type(value)]


def _names(names: object) -> str:
    return ", ".join(repr(name) for name in cast("list[str]", names))


Content = tuple[tuple[Message, ...] | None, str | None]


def _parse_messages(row: Json) -> Content:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise _BadLineError(
            f"column 'messages': got {'an empty array' if turns == [] else _kind(turns)}, expected messages"
        )
    return tuple(_parse_message(turn, number) for number, turn in enumerate(turns, start=1)), None


def _parse_message(turn: object, number: int) -> Message:
    place = f"message {number}:"
    if not isinstance(turn, dict):
        raise _BadLineError(f"{place} got {_kind(turn)}, expected an object with role and content")
    if set(turn) != {"role", "content"}:
        raise _BadLineError(f"{place} got keys {_names(turn) or 'none'}, expected role and content alone")
    role = _string(turn, "role", place)
    if role not in ROLES:
        near = ROLES_ELSEWHERE.get(role.lower()) or nearest_name(role.lower(), ROLES)
        hint = f"; did you mean {near!r}?" if near else ""
        raise _BadLineError(f"{place} unknown role {role!r}, expected {', '.join(ROLES)}{hint}")
    return Message(role, _string(turn, "content", place))


def _exchange(prompt: str, answer: str) -> Content:
    return (Message("user", prompt), Message("assistant", answer)), None


def _parse_prompt_completion(row: Json) -> Content:
    return _exchange(_string(row, "prompt"), _string(row, "completion"))


def _parse_alpaca(row: Json) -> Content:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    given = _string(row, "input") if row.get("input") is not None else ""
    return _exchange(f"{instruction}\n\n{given}" if given else instruction, output)


def _parse_text(row: Json) -> Content:
    return None, _string(row, "text")


@dataclass(frozen=True)
class Layout:
    """A column layout: the columns that tell it, the style of its rows, and how a row is taken from them."""

    columns: tuple[str, ...]
    style: Style
    parse: Callable[[Json], Content]


LAYOUTS: dict[DataFormat, Layout] = {
    "messages": Layout(("messages",), "chat", _parse_messages),
    "prompt_completion": Layout(("prompt", "completion"), "completion", _parse_prompt_completion),
    "text": Layout(("text",), "text", _parse_text),
    "alpaca": Layout(("instruction", "output"), "chat", _parse_alpaca),
}
