"""Folders that are kept from run to run, each under a digest of all that it was made from.

It owns where they lie, how one appears whole or not at all, and which are given up for room; it must not know what is
in them.

Several processes may use one cache: a folder is made under a name of its own and renamed, so that of two that make
the same one the first is kept, and one that is given up stays readable to whoever has mapped it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import DataError

LARGEST_SHARE = 0.1
"""Of the disk, for all that is kept; the one in use may be larger."""
UNFINISHED = ".unfinished-"
ABANDONED_S = 24 * 3600.0
"""Age at which an unfinished folder is one whose process was ended."""


def cache_folder() -> Path:
    """Where folders are kept unless told otherwise: `halfbyte` in the user's folder for caches.

    Source: the XDG Base Directory specification.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "halfbyte" / "rows"


def key_of(facts: Mapping[str, Any]) -> str:
    """Digest of all that a folder is made from, given as JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Kept(NamedTuple):
    """A folder of the cache."""

    folder: Path
    nbytes: int
    used: float


def kept_in(cache: Path) -> list[Kept]:
    """The whole folders of a cache, the longest unused first."""
    found = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        with contextlib.suppress(OSError):  # another process gave it up
            if folder.is_dir() and not folder.name.startswith("."):
                sizes = [file.stat().st_size for file in folder.iterdir()]
                found.append(Kept(folder, sum(sizes), folder.stat().st_mtime))
    return sorted(found, key=lambda kept: kept.used)


def find(cache: Path, key: str) -> Path | None:
    """The folder of a key, noted as used now; None if there is none."""
    folder = cache / key
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read is used all the same
        os.utime(folder)
    return folder


def make(cache: Path, key: str, fill: Callable[[Path], None]) -> Path:
    """Make the folder of a key, and give up old ones if all are too large.

    Args:
        cache: Folder of the cache; is made where there is none.
        key: Digest of all that it is made from.
        fill: Writes into the empty folder it is given, and brings what it writes to the disk.

    Raises:
        DataError: HB218 if it cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=cache))
        try:
            fill(unfinished)
            folder = _publish(unfinished, cache / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        prune(cache, keep=folder)
    except OSError as error:
        what = f"tokenised rows cannot be kept: {error.strerror or error}"
        fix = "set data.cache to a folder with room, or to false"
        raise DataError("HB218", what, where=str(error.filename or cache), fix=fix) from error
    return folder


def _publish(unfinished: Path, folder: Path) -> Path:
    """Give a folder its name; where another process was first, its folder is the same and stays."""
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder.parent, os.O_DIRECTORY)
        try:
            os.fsync(handle)  # the name too is to outlive a loss of power
        finally:
            os.close(handle)
    return folder


def give_up(folder: Path) -> None:
    """Remove a folder; nobody finds half of it."""
    hidden = folder.with_name(f"{UNFINISHED}{os.getpid()}-{folder.name}")
    with contextlib.suppress(OSError):  # another process was first
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def prune(cache: Path, keep: Path, largest_bytes: int | None = None) -> None:
    """Give up the longest unused folders until the rest fits, and what ended processes left.

    Args:
        cache: Folder of the cache.
        keep: Stays whatever its size.
        largest_bytes: Of all together; None is a tenth of the disk.
    """
    now = time.time()
    for folder in cache.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            newest = max(part.stat().st_mtime for part in (folder, *folder.iterdir()))
            if now - newest > ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
    kept = kept_in(cache)
    if largest_bytes is None:
        largest_bytes = int(LARGEST_SHARE * shutil.disk_usage(cache).total)
    left = sum(each.nbytes for each in kept)
    for each in kept:
        if left > largest_bytes and each.folder != keep:
            give_up(each.folder)
            left -= each.nbytes
