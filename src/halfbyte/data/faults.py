"""What is wrong with rows, and how many such rows may be passed over.

It owns how a fault is named and counted; it must not know what a row looks like.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Generic, TypeVar

from halfbyte.errors import FAULTS_SHOWN, listed
from halfbyte.settings import DataFormat


class BadRowError(Exception):
    """What is wrong with a row; the next one is not affected."""


class BadFileError(BadRowError):
    """What is wrong with a file from some place on: where its next row begins cannot be told."""


@dataclass(frozen=True)
class Fault:
    """A faulty row.

    Attributes:
        file: File that holds it.
        line: Line on which it begins, from 1; of a .parquet file the number of the row; None where a file is one row.
        reason: What is wrong with it.
    """

    file: str
    line: int | None
    reason: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.reason}"


F = TypeVar("F")


class Faults(Generic[F]):
    """Faults of one kind: counted all, held only as far as they are told, so that any number of them fits.

    Args:
        allowed: How many are held besides those that an error spells out.
    """

    def __init__(self, allowed: int = 0) -> None:
        self._first: list[F] = []
        self._most = allowed + FAULTS_SHOWN
        self._count = 0

    @classmethod
    def of(cls, faults: Iterable[F], allowed: int = 0) -> Faults[F]:
        """Those that are at hand."""
        found = cls(allowed)
        for fault in faults:
            found.add(fault)
        return found

    def add(self, fault: F) -> None:
        """Note one."""
        self._count += 1
        if len(self._first) < self._most:
            self._first.append(fault)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[F]:
        return iter(self._first)

    def listed(self) -> str:
        """The first ones as lines of an error, and how many more there are."""
        return listed(list(map(str, self._first)), count=self._count)


@dataclass
class Reading:
    """What is met while files of rows are read and checked.

    Attributes:
        allowed: How many faulty rows may be skipped.
        skipped: The faulty rows that were.
        formats: Format of each file that was read.
    """

    allowed: int = 0
    skipped: list[Fault] = field(default_factory=list)
    formats: dict[str, DataFormat] = field(default_factory=dict)

    def skip(self, faults: Faults[Fault]) -> bool:
        """Skip faulty rows if, with those skipped before, they are not too many."""
        if len(self.skipped) + len(faults) > self.allowed:
            return False
        self.skipped += faults
        return True

    def named(self, faults: Faults[Fault]) -> str:
        """Faults that are not skipped as lines of an error, behind those skipped before."""
        allowance = f"; {self.allowed} may be skipped in all" if self.allowed else ""
        told = [str(fault) for fault in (*self.skipped, *faults)]
        return allowance + listed(told, count=len(self.skipped) + len(faults))

    def as_json_lines(self) -> str:
        """The skipped rows, one object with file, line and reason to a line."""
        return "".join(json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in self.skipped)
