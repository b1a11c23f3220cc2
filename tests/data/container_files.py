"""Files of any bytes, and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.containers import CONTAINERS
from halfbyte.data.faults import BadFileError, BadRowError
from halfbyte.data.read import read_rows
from halfbyte.errors import DataError


def write(folder: Path, name: str, content: bytes | str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def found(file: Path) -> list[tuple[int, Any]]:
    """Lines and values of a file; a fault is given as its text, in angle brackets where it ends the file."""
    shown: list[tuple[int, Any]] = []
    for line, value in CONTAINERS[file.suffix](file):
        text = f"<{value}>" if isinstance(value, BadFileError) else str(value)
        shown.append((line, text if isinstance(value, BadRowError) else value))
    return shown


def fault(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert caught.value.code == "HB202"
    return str(caught.value)
