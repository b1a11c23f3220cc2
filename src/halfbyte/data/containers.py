"""The files that rows lie in: which kinds there are, which of a folder's files are meant, and how each is opened.

It owns file names and suffixes; it must not know what a row looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from halfbyte.data.json_rows import json_rows, jsonl_rows
from halfbyte.data.lines import Found, text_rows
from halfbyte.data.parquet_rows import parquet_rows
from halfbyte.data.table_rows import csv_rows, tsv_rows
from halfbyte.errors import DataError, listed

CONTAINERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
"""How the rows of a file are read, by its suffix."""

TABLES = (".csv", ".tsv", ".parquet")
"""Suffixes of files whose rows all have the same columns."""


def row_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that are meant: each file named, and of a folder, in order of their names, all that hold rows.

    Folders inside it belong to it; names that begin with a dot do not, nor do files of another kind.

    Raises:
        DataError: HB201 names every path that cannot be read, and every folder without a file of rows.
    """
    named = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    files: list[Path] = []
    faults: list[str] = []
    for path in named:
        found = _inside(path) if path.is_dir() else [path]
        if not found:
            faults.append(f"{path}: is a folder without a file of rows, expected {_suffixes()}")
        faults += [f"{file}: {reason}" for file in found if (reason := _unreadable(file))]
        files += found
    if faults or not files:
        what = f"{len(faults)} file(s)" + listed(faults) if faults else "no file is named"
        raise DataError("HB201", what, fix="name files of rows, or folders that hold some")
    return files


def _inside(folder: Path) -> list[Path]:
    def is_meant(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix in CONTAINERS and path.is_file() and not hidden

    return sorted(path for path in folder.rglob("*") if is_meant(path))


def _unreadable(file: Path) -> str:
    """Why a file cannot be read, or an empty text."""
    if not file.exists():
        return "does not exist"
    if not file.is_file():
        return "is not a file"
    if file.suffix not in CONTAINERS:
        return f"ends in {file.suffix or 'nothing'!r}, expected {_suffixes()}"
    try:
        with file.open("rb"):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _suffixes() -> str:
    *others, last = CONTAINERS
    return f"{', '.join(others)} or {last}"
