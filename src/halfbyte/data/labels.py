"""The classes of labelled rows: their names, their numbers, and how many rows have each.

It owns what a set of labels must be to be learnt from; it must not know texts' tokens or models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from halfbyte.data.row import Row
from halfbyte.errors import DataError, listed


class Labelled(Protocol):
    """A row with a label."""

    @property
    def where(self) -> str:
        """File, and where in it."""

    @property
    def label(self) -> object:
        """Its class, by name or number."""


@dataclass(frozen=True)
class LabelReport:
    """How rows are spread over their classes.

    Attributes:
        train: Rows to train on per label, in the order of the labels' numbers.
        held_out: Rows held out per label, as well.
        ambiguous: Texts that stand in the rows with more than one label.
    """

    train: Mapping[str, int]
    held_out: Mapping[str, int]
    ambiguous: int

    @classmethod
    def of(cls, labels: Sequence[str], train: Sequence[Row], held_out: Sequence[Row]) -> LabelReport:
        """Count rows."""
        seen: dict[tuple[str | None, str | None], set[str]] = {}
        for row in (*train, *held_out):
            seen.setdefault((row.text, row.text_pair), set()).add(name_of(row))
        trained, measured = (Counter(map(name_of, rows)) for rows in (train, held_out))
        return cls(
            {label: trained[label] for label in labels},
            {label: measured[label] for label in labels},
            sum(len(names) > 1 for names in seen.values()),
        )

    def described(self) -> str:
        """The balance of the rows to train on, or else of those held out, in a few words."""
        counts = self.train if any(self.train.values()) else self.held_out
        total = sum(counts.values())
        shares = ", ".join(f"{label} {count:,} ({count / total:.0%})" for label, count in counts.items())
        more = f"; {self.ambiguous:,} texts have more than one label" if self.ambiguous else ""
        return f"labels {shares}{more}"


def name_of(row: Labelled) -> str:
    """A row's label by name."""
    return str(row.label)


def label_names(names: Iterable[str]) -> tuple[str, ...]:
    """The distinct names in the order of their numbers: whole numbers by value, anything else by name."""
    distinct = set(names)
    if all(name.isascii() and name.removeprefix("-").isdigit() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))


def train_labels(rows: Sequence[Labelled]) -> tuple[str, ...]:
    """The labels of the rows to train on.

    Raises:
        DataError: HB231 if they are fewer than two.
    """
    labels = label_names(map(name_of, rows))
    if len(labels) < 2:
        what = (
            f"all {len(rows):,} rows to train on have the label {labels[0]!r}"
            if labels
            else "no row has a label"
        )
        raise DataError("HB231", f"{what}, expected at least two", fix="give rows of every class")
    return labels


def refuse_unknown(rows: Sequence[Labelled], labels: Sequence[str]) -> None:
    """Refuse rows whose label the model has no class for.

    Args:
        rows: Held-out rows.
        labels: Those it was, or will be, trained on.

    Raises:
        DataError: HB232 naming every such row.
    """
    known = set(labels)
    faults = [f"{row.where}: {name_of(row)!r}" for row in rows if name_of(row) not in known]
    if faults:
        raise DataError(
            "HB232",
            f"{len(faults)} of {len(rows)} held-out rows have a label that was never trained on"
            + listed(faults),
            fix=f"the labels trained on are {' and '.join(map(repr, labels))}; correct these, add rows with them to "
            "data.train, or remove these rows",
        )
