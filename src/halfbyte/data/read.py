"""Files of rows to typed rows, every fault named by file and line.

It owns which format a file has and what becomes of faulty rows; it must not know templates, tokens or what a row
is used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from halfbyte.data.containers import CONTAINERS, TABLES, row_files
from halfbyte.data.faults import BadFileError, BadRowError, Fault, Faults, Reading
from halfbyte.data.layouts import Layout, Place, layout_of
from halfbyte.data.row import Row
from halfbyte.data.tool_calls import may_lack_keys
from halfbyte.data.values import kind
from halfbyte.errors import DataError
from halfbyte.settings import DataFormat


def read_rows(
    paths: str | Path | Sequence[str | Path],
    format: DataFormat = "auto",  # noqa: A002
    reading: Reading | None = None,
) -> list[Row]:
    """Read all rows of some files, in order, into memory; see `iter_rows`.

    Raises:
        DataError: HB201, HB202 or HB215.
    """
    return list(iter_rows(paths, format, reading))


def iter_rows(
    paths: str | Path | Sequence[str | Path],
    format: DataFormat = "auto",  # noqa: A002
    reading: Reading | None = None,
) -> Iterator[Row]:
    """The rows of some files, in order, one at a time; only when all are read is it known that none is faulty.

    A `.jsonl` file has one object per line (blank lines only at its end), a `.json` file one array of them; the first
    line of a `.csv` or `.tsv` file names its columns; a `.txt` file has one text per line that is not blank. Of a
    folder, every file of these kinds and of `.parquet` is read, in the order of their names.

    Args:
        paths: Files and folders.
        format: Columns of the rows; auto takes, per file, the format of its first row that has one.
        reading: How many faulty rows may be skipped; gets those that were, and each file's format.

    Raises:
        DataError: HB201 names every file that cannot be read; HB202 every bad row of every file; HB215 without
            the package that reads Parquet.
    """
    reading = reading or Reading()
    faults: Faults[Fault] = Faults(reading.allowed)
    damaged = False
    for file in row_files(paths):
        reader = _FileReader(file, format, faults)
        yield from reader.rows()
        damaged |= reader.damaged
        reading.formats[str(file)] = reader.format
    if damaged or not reading.skip(faults):
        hiding = ", some of which may hide rows and are never skipped" if damaged and reading.allowed else ""
        what = f"{len(faults)} bad line(s){hiding}" + reading.named(faults)
        raise DataError("HB202", what, fix="mend or remove these lines; nothing was read")


class _FileReader:
    """Reads one file into rows, and what is none into faults.

    Attributes:
        format: The file's; auto until a row tells it.
        damaged: Whether a fault may hide rows behind it, so that it cannot be skipped.
    """

    def __init__(self, file: Path, wanted: DataFormat, faults: Faults[Fault]) -> None:
        self._file = file
        self._wanted = wanted
        self._faults = faults
        self.format = wanted
        self.damaged = False

    def rows(self) -> Iterator[Row]:
        """Read on to the end, or to where the file is damaged."""
        line = 0
        for line, found in CONTAINERS[self._file.suffix](self._file):
            try:
                if isinstance(found, BadRowError):
                    raise found
                row = self._row(found, line)
            except BadRowError as bad:
                self._note(line, str(bad))
                if isinstance(bad, BadFileError):
                    self.damaged = True
                    return
            else:
                yield row
        if line == 0:
            self._note(1, "the file holds no rows")
            self.damaged = True

    def _note(self, line: int, reason: str) -> None:
        self._faults.add(Fault(str(self._file), line, reason))

    def _row(self, found: object, line: int) -> Row:
        if not isinstance(found, dict):
            raise BadRowError(f"got {kind(found)}, expected an object")
        if self._file.suffix == ".parquet" and may_lack_keys(found):
            what = "tools or arguments hold null, which in Parquet may stand for a key that was never given"
            raise BadRowError(f"{what}; write them as JSON text")
        columns = tuple(found)
        if self.format == "auto":
            self.format = self._first_layout(columns).format
        layout = layout_of(columns, self.format)
        if self._wanted == "auto" and (own := layout_of(columns, "auto").format) != self.format:
            raise BadRowError(f"columns of a {own} row, but the rest of the file are {self.format} rows")
        return layout.row(found, Place(str(self._file), line))

    def _first_layout(self, columns: tuple[str, ...]) -> Layout:
        try:
            return layout_of(columns, "auto")
        except BadRowError as bad:
            if self._file.suffix not in TABLES:
                raise
            what = f"{bad}; all rows of the file have these columns, named at its beginning"
            raise BadFileError(what) from None
