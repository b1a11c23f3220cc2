"""Rows that can be trained on: what is refused, what is counted, and which rows are held out.

It owns the judgement of rows by their words; it must not know files, templates or tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.read import Row
from halfbyte.errors import DataError, listed


@dataclass(frozen=True)
class Lengths:
    """How long rows are.

    Attributes:
        shortest: Least.
        median: Half of the rows are no longer than this.
        p95: 95 of 100 rows are no longer than this.
        longest: Greatest.
    """

    shortest: int
    median: int
    p95: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        """Of at least one row."""
        return cls(*np.percentile(lengths, [0, 50, 95, 100], method="higher").tolist())


@dataclass(frozen=True)
class DataReport:
    """What was counted in a set of rows.

    Attributes:
        rows: Rows, duplicates included.
        duplicates: Rows whose words an earlier row has too.
        empty_prompts: Rows with a user turn that is blank.
        styles: Rows per style.
        roles: Turns per role.
        characters: Characters per row, all turns together.
    """

    rows: int
    duplicates: int
    empty_prompts: int
    styles: Mapping[str, int]
    roles: Mapping[str, int]
    characters: Lengths


@dataclass(frozen=True)
class CheckedDataset:
    """Rows that passed every check, and what was counted in them."""

    rows: tuple[Row, ...]
    report: DataReport


def check_rows(rows: Sequence[Row]) -> CheckedDataset:
    """Refuse rows that nothing can be learnt from, and count the rest.

    Raises:
        DataError: HB203 without rows; HB204 names every row with a blank answer or text, without an answer,
            or whose last turn nobody answers.
    """
    if not rows:
        raise DataError("HB203", "got no rows, expected at least one", fix="name files that hold rows")
    faults = [f"{row.where}: {reason}" for row in rows if (reason := _fault(row))]
    if faults:
        what = f"{len(faults)} of {len(rows)} rows" + listed(faults)
        raise DataError("HB204", what, fix="mend or remove these rows")
    return CheckedDataset(tuple(rows), _count(rows))


def _fault(row: Row) -> str:
    """Why nothing can be learnt from a row, or an empty text."""
    if row.messages is None:
        return "the text is blank" if not (row.text or "").strip() else ""
    blank = [
        n for n, m in enumerate(row.messages, start=1) if m.role == "assistant" and not m.content.strip()
    ]
    if blank:
        return f"the answer is blank (message {', '.join(map(str, blank))})"
    if all(m.role != "assistant" for m in row.messages):
        return "no message is from the assistant"
    if row.messages[-1].role != "assistant":
        return f"the last message is from the {row.messages[-1].role}, expected the assistant's answer"
    return ""


def _count(rows: Sequence[Row]) -> DataReport:
    turns = [row.messages or () for row in rows]
    lengths = [len(row.text or "") + sum(len(m.content) for m in row.messages or ()) for row in rows]
    return DataReport(
        rows=len(rows),
        duplicates=len(rows) - len({row.id for row in rows}),
        empty_prompts=sum(any(m.role == "user" and not m.content.strip() for m in turn) for turn in turns),
        styles=dict(Counter(row.style for row in rows)),
        roles=dict(Counter(m.role for turn in turns for m in turn)),
        characters=Lengths.of(lengths),
    )


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the distinct rows, chosen by content hash.

    Equal rows always fall on the same side, and neither order nor files of the rows matter.

    Args:
        rows: Rows to share out.
        fraction: Share of the distinct rows to hold out, rounded, in [0, 1); above 0 it is at least one row.
        seed: Another seed holds out other rows.

    Returns:
        Training rows and held-out rows, each in the order given.

    Raises:
        DataError: HB211 if fewer than two distinct rows are to be shared out.
    """
    if fraction == 0:
        return list(rows), []
    ids = {row.id for row in rows}
    if len(ids) < 2:
        what = f"got {len(ids)} distinct row(s), expected at least 2 to hold some out"
        raise DataError("HB211", what, fix="give more rows, name data.eval, or set data.eval_fraction to 0")
    count = min(max(round(fraction * len(ids)), 1), len(ids) - 1)
    held_out = set(sorted(ids, key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())[:count])
    return [r for r in rows if r.id not in held_out], [r for r in rows if r.id in held_out]


def check_overlap(train: Sequence[Row], evaluation: Sequence[Row]) -> None:
    """Refuse evaluation rows whose words are among the training rows.

    Raises:
        DataError: HB205 names each such row and the training row it equals.
    """
    seen = {row.id: row.where for row in reversed(train)}
    faults = [f"{row.where} equals {seen[row.id]}" for row in evaluation if row.id in seen]
    if faults:
        what = f"{len(faults)} of {len(evaluation)} evaluation rows are training rows" + listed(faults)
        raise DataError("HB205", what, fix="remove them from one side: a score on trained rows says nothing")
