"""Models and rows that another tool's file names: local ones are taken, others are named to be fetched.

It owns how a path of theirs becomes one of ours; it must not know any tool's keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from halfbyte.foreign.draft import Draft

ROWS = {".json", ".jsonl"}


def local(draft: Draft, name: str) -> Path | None:
    """The file or folder of a name, looked for where the tool was called and beside its settings; None if neither."""
    for place in draft.places:
        if (found := place / Path(name).expanduser()).exists():
            return Path(os.path.abspath(found))  # a link stays the name it was given
    return None


def place(draft: Draft, what: str, name: str) -> str:
    """The path of what a name means, with a note where it has to be fetched first.

    Args:
        draft: Gets the note.
        what: What it is, for people.
        name: A path, or a name on a hub.
    """
    found = local(draft, name)
    if found is not None:
        return str(found)
    draft.notes.append(f"{what} {name!r} is not here: fetch it, and put its path in the recipe.")
    return name


def model(draft: Draft, key: str) -> None:
    """Decide the base model."""
    name = draft.get(key)
    if name is None:
        draft.notes.append(f"No model is named ({key}): put its folder in the recipe.")
        return
    found = place(draft, "The model", str(name))
    draft.set("model", found, key, remark="" if local(draft, str(name)) else "not here: fetch it")


def rows(draft: Draft, setting: str, names: list[str], *keys: str) -> None:
    """Decide the files of rows of `data.train` or `data.eval`."""
    found = [place(draft, "The data set", name) for name in names]
    away = [name for name in names if local(draft, name) is None]
    draft.set(setting, found, *keys, remark="not here: fetch " + ", ".join(away) if away else "")
