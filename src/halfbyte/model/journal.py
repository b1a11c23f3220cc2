"""Which parts of a long piece of work are finished: a file that is only added to, line by line.

It owns the lines and the lock; it must not know what the work is, or whether a finished part is still as it was.

The first line says what the work is. A line is believed if it is whole; all after one that is not is forgotten. One
process at a time has the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from halfbyte.errors import ModelError


class Journal:
    """The journal of one piece of work.

    Args:
        file: Created, or gone on with where it is of the same work.
        work: What the work is, as JSON can say it.

    Attributes:
        finished: Part → what was said of it; empty where the journal begins.
        other: What differs, in words, where the file was of other work, of which nothing is left in it.

    Raises:
        ModelError: HB364 when another process has it.
    """

    def __init__(self, file: Path, work: Mapping[str, Any]) -> None:
        self._stream = file.open("a+b")
        self._lock(file)
        self.finished: dict[str, dict[str, str]] = {}
        self.other: list[str] = []
        self._stream.seek(0)
        lines, whole = [], 0
        for raw in self._stream:
            line = _parsed(raw)
            if line is None:
                break
            lines.append(line)
            whole += len(raw)
        before = lines[0] if lines else {}
        if before == work:
            self.finished = {line["part"]: line for line in lines[1:]}
            self._stream.truncate(whole)
            return
        self.other = [key for key in work if key in before and before[key] != work[key]]
        self._stream.truncate(0)
        self._append(work)
        self.sync()

    def add(self, facts: Mapping[str, str]) -> None:
        """Say that a part is finished, even if the process is killed from now on.

        Args:
            facts: What is known of it; `part` is its name.

        Raises:
            OSError: The disk is full, or fails.
        """
        self.finished[facts["part"]] = dict(facts)
        self._append(facts)

    def sync(self) -> None:
        """Have all that was said on the disk."""
        os.fsync(self._stream.fileno())

    def _append(self, line: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()

    def _lock(self, file: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            self._stream.close()
            raise ModelError(
                "HB364",
                f"another process is writing here: {fault}",
                where=str(file.parent),
                fix="let it finish, or end it; then give the same command again",
            ) from fault

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A line, None for one that was not written to its end."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
