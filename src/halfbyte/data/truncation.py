"""Rows that are cut at the longest length allowed: how many of them are too many.

It owns that share, and how it and rows of which none is left are told; it must not know how rows are tokenised.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.faults import Faults
from halfbyte.errors import DataError


def refuse_none_left(examples: int, max_length: int) -> None:
    """Refuse rows of which none is left.

    Raises:
        DataError: HB203 if there is no example.
    """
    if not examples:
        what = f"every row was skipped: none has a trained token among its first {max_length}"
        raise DataError("HB203", what, fix="raise data.max_length")


def refuse_too_many_cut(
    wholes: NDArray[np.int64], max_length: int, share: float, place: Callable[[int], str]
) -> None:
    """Refuse rows of which too many are cut.

    Args:
        wholes: Tokens of each before it was cut, (n,).
        max_length: Tokens that were kept.
        share: Share of the rows that may be cut, 0 to 1.
        place: Where the row of an index stands.

    Raises:
        DataError: HB221, naming every row that is cut.
    """
    cut = np.flatnonzero(wholes > max_length)
    if len(cut) <= share * len(wholes):
        return
    faults: Faults[str] = Faults()
    for at in cut.tolist():
        faults.add(f"{place(at)}: {wholes[at]:,} tokens")
    raise DataError(
        "HB221",
        f"{len(cut)} of {len(wholes)} rows have more than {max_length} tokens, expected at most {share:.1%} of them"
        + faults.listed(),
        fix=f"raise data.max_length (the longest row has {wholes.max():,} tokens), or data.max_truncated if the "
        "ends of these rows, their stop tokens among them, need not be learnt",
    )
