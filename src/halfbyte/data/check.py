"""Rows that can be trained on: what is refused, what is counted, and which rows are held out.

It owns the judgement of rows by their words; it must not know files, templates or tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data.faults import Fault, Reading
from halfbyte.data.row import Objective, Row, Turns
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
        labels: Rows per label; of rows that are judged or classified.
        characters: Characters per row, all turns and both answers together.
    """

    rows: int
    duplicates: int
    empty_prompts: int
    styles: Mapping[str, int]
    roles: Mapping[str, int]
    labels: Mapping[str, int]
    characters: Lengths


@dataclass(frozen=True)
class CheckedDataset:
    """Rows that passed every check, and what was counted in them."""

    rows: tuple[Row, ...]
    report: DataReport


FORMATS_FOR: Mapping[Objective, str] = {
    "sft": "messages, sharegpt, alpaca, prompt_completion or text",
    "preference": "preference",
    "kto": "kto",
    "classification": "classification",
}
"""Formats whose rows an objective learns from."""


def check_rows(
    rows: Sequence[Row], objective: Objective = "sft", reading: Reading | None = None
) -> CheckedDataset:
    """Refuse rows that nothing can be learnt from, and count the rest.

    Args:
        rows: Rows of any format.
        objective: What is to be learnt from them.
        reading: How many faulty rows may be skipped; gets those that were.

    Raises:
        DataError: HB203 without rows; HB204 names every row with a blank answer or text, without an answer,
            whose last turn nobody answers, or with two equal answers to choose from; HB216 names every row
            that is for another objective.
    """
    if others := [row for row in rows if row.objective != objective]:
        faults = [f"{row.where}: a {row.objective} row" for row in others]
        what = f"{len(others)} of {len(rows)} rows are not for {objective}" + listed(faults)
        fix = f"give rows of the format {FORMATS_FOR[objective]}; data.format says how columns are to be read"
        raise DataError("HB216", what, fix=fix)
    reading = reading or Reading()
    reasons = {at: reason for at, row in enumerate(rows) if (reason := _fault(row))}
    bad = [Fault(rows[at].source, rows[at].line, reason) for at, reason in reasons.items()]
    if not reading.skip(bad):
        what = f"{len(bad)} of {len(rows)} rows" + reading.named(bad)
        raise DataError("HB204", what, fix="mend or remove these rows")
    kept = tuple(row for at, row in enumerate(rows) if at not in reasons)
    if not kept:
        raise DataError("HB203", "got no rows, expected at least one", fix="name files that hold rows")
    return CheckedDataset(kept, _count(kept))


def _fault(row: Row) -> str:
    """Why nothing can be learnt from a row, or an empty text."""
    if row.messages is None:
        blank = not (row.text or "").strip() or (row.text_pair is not None and not row.text_pair.strip())
        return "the text is blank" if blank else ""
    if reason := _unanswered(row.messages):
        return reason
    if row.rejected is None:
        return ""
    if reason := _unanswered(row.rejected):
        return f"rejected: {reason}"
    return "the chosen and the rejected answer are the same" if row.rejected == row.messages else ""


def _unanswered(turns: Turns) -> str:
    """Why a conversation does not end in an answer, or an empty text."""
    blank = [
        n
        for n, m in enumerate(turns, start=1)
        if m.role == "assistant" and not m.content.strip() and not m.tool_calls
    ]
    if blank:
        return f"the answer is blank (message {', '.join(map(str, blank))})"
    if all(m.role != "assistant" for m in turns):
        return "no message is from the assistant"
    calls = False
    for n, m in enumerate(turns, start=1):
        if m.role == "tool" and not calls:
            return f"no call of a tool precedes what one returns (message {n})"
        calls = bool(m.tool_calls) or (m.role == "tool" and calls)
    if turns[-1].role != "assistant":
        return f"the last message is from the {turns[-1].role}, expected the assistant's answer"
    return ""


def _count(rows: Sequence[Row]) -> DataReport:
    turns = [row.messages or () for row in rows]
    lengths = [
        len(row.text or "")
        + len(row.text_pair or "")
        + sum(len(m.content) for m in (*(row.messages or ()), *(row.rejected or ())))
        for row in rows
    ]
    return DataReport(
        rows=len(rows),
        duplicates=len(rows) - len({row.id for row in rows}),
        empty_prompts=sum(any(m.role == "user" and not m.content.strip() for m in turn) for turn in turns),
        styles=dict(Counter(row.style for row in rows)),
        roles=dict(Counter(m.role for turn in turns for m in turn)),
        labels=dict(Counter(str(row.label) for row in rows if row.label is not None)),
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
