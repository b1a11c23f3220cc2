"""JSON files as plain values: an object to a line, or one array of them, read piece by piece.

It owns JSON's grammar, kept strictly; it must not know what an object's keys mean.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from halfbyte.data import lines
from halfbyte.data.faults import BadFileError, BadRowError
from halfbyte.data.lines import Found, decode, read_lines

CHUNK_BYTES = 2**20
BLANKS = re.compile(r"[ \t\r\n]*")


def jsonl_rows(file: Path) -> Iterator[Found]:
    """The object of each line; blank lines are faults unless nothing follows them."""
    blank: list[int] = []
    for number, line in enumerate(read_lines(file), start=1):
        if isinstance(line, bytes) and not line.strip():
            blank.append(number)
            continue
        for before in blank:
            yield before, BadRowError("empty line")
        blank.clear()
        try:
            yield number, _parse(line)
        except BadRowError as bad:
            yield number, bad


def _parse(line: bytes | BadRowError) -> object:
    text = decode(line)
    try:
        return DECODER.decode(text.rstrip("\r\n"))
    except (ValueError, RecursionError) as error:
        cut = "" if text.endswith("\n") else "; the file ends in this line without a line end: is it whole?"
        raise BadRowError(_reason(error) + cut) from None


def parse_json(text: str) -> object:
    """A text that is one JSON value.

    Raises:
        BadRowError: What is not JSON in it.
    """
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(_reason(error)) from None


def json_rows(file: Path) -> Iterator[Found]:
    """The elements of the file's array; reading ends at the first place that is not JSON."""
    with file.open("rb") as stream:
        window = _Window(stream)
        try:
            yield from _elements(window)
        except json.JSONDecodeError as error:
            window.advance(error.pos)
            yield window.line, BadFileError(f"not JSON: {error.msg} at column {window.column}")
        except (ValueError, RecursionError) as error:
            yield window.line, BadFileError(_reason(error))
        except BadRowError as bad:
            yield window.line, BadFileError(str(bad))


def _elements(window: _Window) -> Iterator[Found]:
    if (first := window.next()) != "[":
        hint = "; rows one to a line belong in a .jsonl file" if first == "{" else ""
        raise BadFileError("expected a JSON array of objects" + hint)
    window.advance(window.at + 1)
    after = window.next()
    while after != "]":
        found, length = window.element()
        line = window.line
        yield line, found
        window.advance(window.at + length)
        after = window.next()
        if after == ",":
            window.advance(window.at + 1)
            after = window.next()
            if after == "]":
                raise BadFileError("a comma before the closing bracket")
        elif after != "]":
            window.line = line
            raise BadFileError("expected a comma or the closing bracket after this object")
    window.advance(window.at + 1)
    if window.next():
        raise BadFileError("something follows the array")


class _Window:
    """The part of a JSON file that is being read; what lies before it is forgotten.

    Attributes:
        text: The part.
        at: Where in it reading stands.
        line: Line of that place, from 1.
        column: Column of that place, from 1.
        ended: Whether the part goes up to the file's end.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._bytes = 0
        self.text = ""
        self.at = 0
        self.line = 1
        self.column = 1
        self.ended = False

    def more(self) -> None:
        """Read on: at least as much again as is left."""
        kept = self.text[self.at :]
        if len(kept) > lines.MAX_ROW_BYTES:
            raise lines.too_long()
        content = self._stream.read(max(CHUNK_BYTES, len(kept)))
        if (nul := content.find(b"\0")) >= 0:
            self.line += kept.count("\n") + content.count(b"\n", 0, nul)
            raise BadFileError(f"NUL byte at byte {self._bytes + nul + 1}")
        pending = len(self._decoder.getstate()[0])  # bytes of a character that the last piece cut
        try:
            self.text = kept + self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            at = error.start - pending
            self.line += kept.count("\n") + content.count(b"\n", 0, max(at, 0))
            raise BadFileError(f"not UTF-8 at byte {self._bytes + at + 1}: {error.reason}") from None
        self.at = 0
        self._bytes += len(content)
        self.ended = not content

    def advance(self, to: int) -> None:
        """Move on within the part, counting lines and columns."""
        newlines = self.text.count("\n", self.at, to)
        self.line += newlines
        self.column = to - self.text.rfind("\n", self.at, to) if newlines else self.column + to - self.at
        self.at = to

    def next(self) -> str:
        """The next character that is not blank, without moving past it; an empty text at the file's end."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None  # no blank at all matches too
            self.advance(blanks.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def element(self) -> tuple[object, int]:
        """The value that begins here and its length; one that is JSON but refused is given as its fault."""
        while True:
            try:
                found, end = _decoded(self.text, self.at)
            except json.JSONDecodeError:
                if self.ended:
                    raise
                self.more()
                continue
            if self.ended or end < len(self.text):  # at the part's end a number may go on
                length = end - self.at
                return (found if length <= lines.MAX_ROW_BYTES else lines.too_long()), length
            self.more()


def _decoded(text: str, at: int) -> tuple[object, int]:
    try:
        return DECODER.raw_decode(text, at)
    except BadRowError as bad:
        return bad, json.JSONDecoder().raw_decode(text, at)[1]


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply"
    return f"not JSON: {error}"


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = ", ".join(repr(key) for key in found if keys.count(key) > 1)
        raise BadRowError(f"key {twice} is given twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BadRowError(f"not JSON: {name} is not a JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
