"""How often each row is trained on: sources of rows in other proportions than their lengths.

It owns which rows are repeated and which are left out; it must not know what rows say or how they are ordered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check import first_by_hash, row_ids
from halfbyte.data.containers import row_files
from halfbyte.data.row import Row
from halfbyte.errors import DataError


def file_weights(paths: Sequence[str | Path], weights: Sequence[float]) -> dict[str, float]:
    """The weight of each file that some paths mean.

    Args:
        paths: Files and folders.
        weights: One for each path.

    Raises:
        DataError: HB201 for what cannot be read; HB217 for a file that two paths with different weights mean.
    """
    found: dict[str, float] = {}
    for path, weight in zip(paths, weights, strict=True):
        for file in row_files(path):
            if found.setdefault(str(file), weight) != weight:
                what = f"got the weights {found[str(file)]:g} and {weight:g}"
                fix = "name the file once in data.train, or give both places one weight"
                raise DataError("HB217", what, where=str(file), fix=fix)
    return found


def weigh_rows(rows: Sequence[Row], weights: Mapping[str, float], seed: int) -> list[Row]:
    """Repeat rows, or choose among them, by the weight of their file.

    With a weight of 2 every row of a file comes twice, with 0.5 half of them come, with 1.5 every row and half
    of them a second time. Which half is decided by content and seed, whatever the order of the rows. Of a file
    with any rows at least one stays.

    Args:
        rows: Rows to train on, those held out no longer among them.
        weights: By file, greater than 0; 1 for any other file.
        seed: Another seed chooses others.

    Returns:
        Rows in the order given, those that are repeated side by side.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(row.source for row in rows))}
    sources = np.array([names[row.source] for row in rows], np.int64)
    times = times_of(row_ids(rows), sources, [weights.get(name, 1.0) for name in names], seed)
    return [row for row, count in zip(rows, times.tolist(), strict=True) for _ in range(count)]


def times_of(
    ids: NDArray[np.uint64], sources: NDArray[np.int64], weights: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """How often `weigh_rows` takes each row, (n,).

    Args:
        ids: Content hashes of the rows, (n,).
        sources: Number of the file that each came from, (n,).
        weights: By that number.
        seed: Another seed chooses others.
    """
    times = np.zeros(len(ids), np.int64)
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        whole, part = divmod(weight, 1)
        extra = max(round(part * len(members)), int(whole == 0)) if len(members) else 0
        times[members] = int(whole) + first_by_hash(ids[members], extra, f"weight:{seed}:")
    return times
