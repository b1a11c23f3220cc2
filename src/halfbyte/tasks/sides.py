"""Rows of a run's files: read, checked, shared out between training and measuring.

It owns which rows are trained on and which are held out; it must not know what is learnt from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.data.check import CheckedDataset, DataReport, check_overlap, check_rows, split_rows
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.row import Objective, Row
from halfbyte.data.weigh import file_weights, weigh_rows

if TYPE_CHECKING:
    from halfbyte.settings import Config


@dataclass(frozen=True)
class Sides:
    """The rows of a run.

    Attributes:
        train: To train on; none where a model is only measured.
        held_out: To measure on, none of them trained on; may be empty.
        report: What was counted in the files for training, held-out rows included; where a model is only
            measured, in those it is measured on.
        reading: Formats of the files, and the faulty rows that were skipped.
    """

    train: list[Row]
    held_out: list[Row]
    report: DataReport
    reading: Reading


def read_sides(config: Config, objective: Objective, held_out_only: bool = False) -> Sides:
    """Read and check the rows and share them out.

    Args:
        config: Files, formats, shares, seed.
        objective: What is to be learnt from the rows.
        held_out_only: Measure all rows of `data.eval`, or else of `data.train`, and train on none.

    Raises:
        DataError: HB201 to HB217, each naming every faulty row.
    """
    data = config.data
    reading = Reading(data.skip_bad_rows)

    def checked(paths: list[str]) -> CheckedDataset:
        return check_rows(read_rows(paths, data.format, reading), objective, reading)

    if held_out_only:
        found = checked(data.eval or data.train)
        return Sides([], list(found.rows), found.report, reading)
    found = checked(data.train)
    if data.eval:
        train, held_out = list(found.rows), list(checked(data.eval).rows)
        check_overlap(train, held_out)
    else:
        train, held_out = split_rows(found.rows, data.eval_fraction, config.seed)
    if data.weights is not None:
        train = weigh_rows(train, file_weights(data.train, data.weights), config.seed)
    return Sides(train, held_out, found.report, reading)
