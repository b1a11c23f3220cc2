"""Parquet files as plain values.

It owns which column types are taken; it must not know what a column means. It never loads pyarrow unless a file
asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data import lines
from halfbyte.data.faults import BadFileError, BadRowError
from halfbyte.data.lines import Found
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

    import pyarrow as pa
    import pyarrow.parquet as pq

READ_BYTES = 2**20  # at once; otherwise a whole column of a row group is
ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 16 * 2**20
"""Of rows of average size. More may be held only where a file's pages are larger, which are decoded whole."""


@dataclass(frozen=True)
class UntakenValue:
    """Stands for a cell of a type that no row is made of; a column nobody reads may have any type.

    Attributes:
        type: The type's name in Arrow.
    """

    type: str


def require_pyarrow(file: Path) -> ModuleType:
    """The package that reads Parquet.

    Raises:
        DataError: HB215 if it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        what = f"reading .parquet needs pyarrow: {error}"
        raise DataError("HB215", what, where=str(file), fix="pip install 'halfbyte[parquet]'") from error
    package: ModuleType = pyarrow
    return package


def parquet_rows(file: Path) -> Iterator[Found]:
    """Each row by column name, numbered from 1.

    Raises:
        DataError: HB215 if pyarrow is not installed.
    """
    arrow = require_pyarrow(file)
    number = 0
    try:
        with arrow.parquet.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False) as opened:
            schema = opened.schema_arrow
            taken = [f.name for f in schema if _is_taken(f.type, arrow)]
            untaken = {f.name: UntakenValue(str(f.type)) for f in schema if not _is_taken(f.type, arrow)}
            if len(set(schema.names)) != len(schema.names):
                raise BadFileError("a column is named twice")
            for batch in opened.iter_batches(_rows_at_once(opened.metadata), columns=taken):
                suspect = batch.nbytes > lines.MAX_ROW_BYTES
                for at in range(batch.num_rows):
                    number += 1
                    long = suspect and _row_bytes(batch, at, arrow) > lines.MAX_ROW_BYTES
                    yield number, lines.too_long() if long else _row(batch, at, untaken)
    except (arrow.ArrowException, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        yield number + 1, BadFileError(f"not Parquet, or damaged: {first}")
    except BadFileError as bad:
        yield number + 1, bad


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size // group.num_rows for group in groups if group.num_rows), default=0)
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(mean, 1)))


def _row_bytes(batch: pa.RecordBatch, at: int, arrow: ModuleType) -> int:
    """Bytes of a row's own values; a dictionary that rows share is not one row's."""
    cells = [column.slice(at, 1) for column in batch.columns]
    return sum(
        (cell.dictionary_decode() if arrow.types.is_dictionary(cell.type) else cell).nbytes for cell in cells
    )


def _row(batch: pa.RecordBatch, at: int, untaken: dict[str, UntakenValue]) -> object:
    try:
        found = {
            name: column[at].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8 at byte {error.start + 1} of a cell: {error.reason}")
    return found | untaken


def _is_taken(type_: pa.DataType, arrow: ModuleType) -> bool:
    """Whether a type is text, a number, true or false, nothing, or lists and structs of such."""
    kinds = arrow.types
    if kinds.is_dictionary(type_):
        return _is_taken(type_.value_type, arrow)
    if kinds.is_list(type_) or kinds.is_large_list(type_) or kinds.is_fixed_size_list(type_):
        return _is_taken(type_.value_type, arrow)
    if kinds.is_struct(type_):
        return all(_is_taken(type_.field(i).type, arrow) for i in range(type_.num_fields))
    plain = (
        kinds.is_string,
        kinds.is_large_string,
        kinds.is_string_view,
        kinds.is_boolean,
        kinds.is_integer,
        kinds.is_floating,
        kinds.is_null,
    )
    return any(is_kind(type_) for is_kind in plain)
