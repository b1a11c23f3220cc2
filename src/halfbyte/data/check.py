"""Rows that can be trained on: what is refused, what is counted, and which rows are held out.

It owns the judgement of rows by their words; it must not know files, templates or tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.faults import Fault, Faults, Reading
from halfbyte.data.row import Objective, Row, Turns
from halfbyte.errors import DataError


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
    def of(cls, lengths: Sequence[int] | NDArray[np.int64]) -> Lengths:
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
    "tagging": "tagging",
    "similarity": "similarity",
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
        DataError: HB203, HB204 or HB216, as `Checker` has them.
    """
    checker = Checker(objective, reading)
    kept = tuple(row for row in rows if checker.take(row))
    return CheckedDataset(kept, checker.report())


class Checker:
    """Judges rows one by one, and counts those that it keeps; of each it holds two numbers.

    Args:
        objective: What is to be learnt from them.
        reading: How many faulty rows may be skipped; gets those that were.
    """

    def __init__(self, objective: Objective = "sft", reading: Reading | None = None) -> None:
        self._objective = objective
        self._reading = reading or Reading()
        self._rows = self._empty_prompts = self._total = 0
        self._others: Faults[str] = Faults()
        self._bad: Faults[Fault] = Faults(self._reading.allowed)
        self._ids, self._characters = array("Q"), array("Q")
        self._styles, self._roles, self._labels = Counter[str](), Counter[str](), Counter[str]()

    @property
    def characters(self) -> int:
        """Characters of the rows that were kept."""
        return self._total

    @property
    def ids(self) -> NDArray[np.uint64]:
        """Content hashes of the rows that were kept, in order."""
        return np.array(self._ids, np.uint64)

    def take(self, row: Row) -> bool:
        """Whether something can be learnt from a row; it is counted either way."""
        self._rows += 1
        if row.objective != self._objective:
            self._others.add(f"{row.where}: a {row.objective} row")
            return False
        if reason := fault_of(row):
            self._bad.add(Fault(row.source, row.line, reason))
            return False
        turns = row.messages or ()
        self._ids.append(int(row.id, 16))
        words = (*turns, *(row.rejected or ()))
        characters = len(row.text or "") + len(row.text_pair or "") + sum(len(m.content) for m in words)
        self._characters.append(characters)
        self._total += characters
        self._empty_prompts += any(m.role == "user" and not m.content.strip() for m in turns)
        self._styles[row.style] += 1
        self._roles.update(m.role for m in turns)
        if row.label is not None:
            self._labels[str(row.label)] += 1
        return True

    def report(self) -> DataReport:
        """What was counted, once all rows were taken.

        Raises:
            DataError: HB203 without rows; HB204 names every row with a blank answer or text, without an answer,
                whose last turn nobody answers, or with two equal answers to choose from; HB216 names every row
                that is for another objective.
        """
        if self._others:
            what = f"{len(self._others)} of {self._rows} rows are not for {self._objective}"
            wanted = FORMATS_FOR[self._objective]
            fix = f"give rows of the format {wanted}; data.format says how columns are to be read"
            raise DataError("HB216", what + self._others.listed(), fix=fix)
        if not self._reading.skip(self._bad):
            what = f"{len(self._bad)} of {self._rows} rows" + self._reading.named(self._bad)
            raise DataError("HB204", what, fix="mend or remove these rows")
        if not self._ids:
            raise DataError("HB203", "got no rows, expected at least one", fix="name files that hold rows")
        return DataReport(
            rows=len(self._ids),
            duplicates=len(self._ids) - len(np.unique(self.ids)),
            empty_prompts=self._empty_prompts,
            styles=dict(self._styles),
            roles=dict(self._roles),
            labels=dict(self._labels),
            characters=Lengths.of(np.array(self._characters, np.int64)),
        )


def fault_of(row: Row) -> str:
    """Why nothing can be learnt from a row, or an empty text."""
    if row.messages is None:
        texts = [row.text or "", *(text for text in (row.text_pair, row.negative) if text is not None)]
        blank = not all(text.strip() for text in texts)
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


class Known(Protocol):
    """A row that is known by its content."""

    @property
    def id(self) -> str:
        """Content hash."""

    @property
    def where(self) -> str:
        """File, and where in it."""


K = TypeVar("K", bound=Known)


def split_rows(rows: Sequence[K], fraction: float, seed: int) -> tuple[list[K], list[K]]:
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
    held_out = held_out_of(row_ids(rows), fraction, seed)
    return [r for r, out in zip(rows, held_out, strict=True) if not out], [
        r for r, out in zip(rows, held_out, strict=True) if out
    ]


def row_ids(rows: Sequence[Known]) -> NDArray[np.uint64]:
    """The content hashes of rows as numbers, (n,)."""
    return np.array([int(row.id, 16) for row in rows], np.uint64)


def held_out_of(ids: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which rows `split_rows` holds out, by their content hashes, (n,).

    Raises:
        DataError: HB211 if fewer than two distinct rows are to be shared out.
    """
    if fraction == 0:
        return np.zeros(len(ids), np.bool_)
    distinct = np.unique(ids)
    if len(distinct) < 2:
        what = f"got {len(distinct)} distinct row(s), expected at least 2 to hold some out"
        raise DataError("HB211", what, fix="give more rows, name data.eval, or set data.eval_fraction to 0")
    count = min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    chosen: NDArray[np.bool_] = np.isin(ids, distinct[first_by_hash(distinct, count, f"{seed}:")])
    return chosen


def first_by_hash(ids: NDArray[np.uint64], count: int, salt: str) -> NDArray[np.bool_]:
    """Which of some rows come first by the SHA-256 of a salt and their content hash, (n,); of equal rows the earlier.

    Eight bytes of each digest are held; more is worked out only for those that share them with the last one.
    """
    if count == 0:
        return np.zeros(len(ids), np.bool_)

    def digest(row_id: int) -> bytes:
        return hashlib.sha256(f"{salt}{row_id:016x}".encode()).digest()

    parts = (ids[at : at + 2**16].tolist() for at in range(0, len(ids), 2**16))
    heads = (int.from_bytes(digest(i)[:8], "big") for part in parts for i in part)
    ranks = np.fromiter(heads, np.uint64, len(ids))
    last = np.partition(ranks, count - 1)[count - 1]
    chosen: NDArray[np.bool_] = ranks < last
    tied = sorted(np.flatnonzero(ranks == last).tolist(), key=lambda at: digest(int(ids[at])))
    chosen[tied[: count - int(chosen.sum())]] = True
    return chosen


def check_overlap(train: Sequence[Known], evaluation: Sequence[Known]) -> None:
    """Refuse evaluation rows whose words are among the training rows.

    Raises:
        DataError: HB205 names each such row and the training row it equals.
    """
    refuse_overlap(
        (row_ids(train), lambda at: train[at].where), (row_ids(evaluation), lambda at: evaluation[at].where)
    )


Side = tuple[NDArray[np.uint64], Callable[[int], str]]
"""Content hashes of rows, and where the row of an index stands."""


def refuse_overlap(train: Side, evaluation: Side) -> None:
    """As `check_overlap`, for rows that are known by their content hashes.

    Raises:
        DataError: HB205 names each row to evaluate on that is trained on, and the training row it equals.
    """
    (trained, place), (measured, own_place) = train, evaluation
    order = np.argsort(trained, kind="stable")  # of equal rows the first one is named
    beside = np.searchsorted(trained[order], measured)
    shared = np.flatnonzero(np.isin(measured, trained))
    faults: Faults[str] = Faults()
    for at in shared.tolist():
        faults.add(f"{own_place(at)} equals {place(int(order[beside[at]]))}")
    if faults:
        what = f"{len(faults)} of {len(measured)} evaluation rows are training rows" + faults.listed()
        raise DataError("HB205", what, fix="remove them from one side: a score on trained rows says nothing")
