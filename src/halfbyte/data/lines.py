"""The lines of a text file, none longer than a limit, and text files that are nothing but lines.

It owns what bytes a line may hold; it must not know what a line says.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from halfbyte.data.faults import BadRowError

MAX_ROW_BYTES = 64 * 2**20
"""Longest row of a text file. Books of 10 MB fit; a file of another kind without line ends does not fill memory."""

Found = tuple[int, object]
"""Line on which a row begins, and the row as plain values or a `BadRowError`."""


def read_lines(file: Path) -> Iterator[bytes | BadRowError]:
    """Each line with its line end, or what is wrong with it; one that is too long is passed over in pieces."""
    with file.open("rb") as stream:
        start = codecs.BOM_UTF8
        while line := stream.readline(MAX_ROW_BYTES + 1):
            if len(line) <= MAX_ROW_BYTES:
                yield line.removeprefix(start)
            else:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_ROW_BYTES)
                yield too_long()
            start = b""


def too_long() -> BadRowError:
    """The fault of a row beyond the limit."""
    return BadRowError(f"longer than {MAX_ROW_BYTES // 2**20} MiB, which no row is; is a line end missing?")


def decode(content: bytes | BadRowError) -> str:
    """A line as text.

    Raises:
        BadRowError: The line's own fault, NUL, or what is not UTF-8.
    """
    if isinstance(content, BadRowError):
        raise content
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadRowError("not UTF-8 but UTF-16; save the file as UTF-8")
    if (nul := content.find(b"\0")) >= 0:
        raise BadRowError(f"NUL byte at byte {nul + 1}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 at byte {error.start + 1}: {error.reason}") from None


def text_rows(file: Path) -> Iterator[Found]:
    """One row per line that is not blank, without its line end.

    That is how the `text` loader of Hugging Face's datasets cuts a file, and with it LLaMA-Factory's and
    axolotl's; blank lines only part others here. A text of several lines belongs in a .jsonl file.
    """
    for number, line in enumerate(read_lines(file), start=1):
        try:
            text = decode(line).rstrip("\r\n")
        except BadRowError as bad:
            yield number, bad
            continue
        if text.strip():
            yield number, {"text": text}
