"""Rows of a run's files: read, checked, shared out between training and measuring.

It owns which rows are trained on and which are held out; it must not know what is learnt from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check import (
    CheckedDataset,
    DataReport,
    check_overlap,
    check_rows,
    held_out_of,
    refuse_overlap,
    split_rows,
)
from halfbyte.data.encode import Encoding
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.row import OBJECTIVES, Row
from halfbyte.data.token_file import StoredExamples, TokenFile
from halfbyte.data.truncation import refuse_too_many_cut
from halfbyte.data.weigh import file_weights, times_of, weigh_rows

if TYPE_CHECKING:
    from halfbyte.data.render import Renderer
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


def read_sides(config: Config, held_out_only: bool = False) -> Sides:
    """Read and check the rows and share them out.

    Args:
        config: Task, files, formats, shares, seed.
        held_out_only: Measure all rows of `data.eval`, or else of `data.train`, and train on none.

    Raises:
        DataError: HB201 to HB217, each naming every faulty row.
    """
    data = config.data
    reading = Reading(data.skip_bad_rows)

    def checked(paths: list[str]) -> CheckedDataset:
        return check_rows(read_rows(paths, data.format, reading), OBJECTIVES[config.task], reading)

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


@dataclass(frozen=True)
class StoredSides:
    """The rows of a run, tokenised, in files that are mapped into memory.

    Attributes:
        train: As `Sides`.
        held_out: As `Sides`.
        report: As `Sides`.
        reading: As `Sides`.
        stop_ids: Token ids that end an answer.
        notes: What a person should know of rows that an earlier run kept.
    """

    train: StoredExamples
    held_out: StoredExamples
    report: DataReport
    reading: Reading
    stop_ids: tuple[int, ...]
    notes: list[str]


def store_sides(
    config: Config,
    renderer: Renderer,
    held_out_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> StoredSides:
    """As `read_sides` for words to write, tokenised too, whatever the size of the files.

    Args:
        config: Files, formats, shares, seed.
        renderer: Writes rows out, and holds the tokenizer.
        held_out_only: Measure all rows of `data.eval`, or else of `data.train`, and train on none.
        progress: Told how far each part of the work is.

    Raises:
        DataError: HB201 to HB227, each naming every faulty row.
    """
    data = config.data
    how = Encoding(data, renderer, Reading(data.skip_bad_rows), progress)
    found = how.encode((data.eval or data.train) if held_out_only else data.train)
    rows = np.arange(len(found.file.rows))
    measured = found
    if held_out_only:
        train, held_out = StoredExamples(found.file, rows[:0]), StoredExamples(found.file, rows)
    elif data.eval:
        measured = how.encode(data.eval)
        train, held_out = (
            StoredExamples(found.file, rows),
            StoredExamples(measured.file, np.arange(len(measured.file.rows))),
        )
        refuse_overlap((train.file.rows["id"], train.where), (held_out.file.rows["id"], held_out.where))
    else:
        out = held_out_of(found.file.rows["id"], data.eval_fraction, config.seed)
        train, held_out = StoredExamples(found.file, rows[~out]), StoredExamples(found.file, rows[out])
    if data.weights is not None and not held_out_only:
        train = StoredExamples(train.file, _weighed(train.file, train.order, config))
    for side in (train, held_out):
        refuse_too_many_cut(side.numbers("whole"), data.max_length, data.max_truncated, side.where)
    return StoredSides(train, held_out, found.report, how.reading, measured.stop_ids, how.notes)


def _weighed(file: TokenFile, order: NDArray[np.int64], config: Config) -> NDArray[np.int64]:
    """Rows of a token file, each as often as the weight of its file has it."""
    weights = file_weights(config.data.train, config.data.weights or ())
    by_source = [weights.get(source, 1.0) for source in file.sources]
    rows = file.rows[order]
    repeated: NDArray[np.int64] = np.repeat(
        order, times_of(rows["id"], rows["source"], by_source, config.seed)
    )
    return repeated
