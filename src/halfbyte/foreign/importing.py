"""A settings file of another tool as a recipe: every key taken, named as meaning nothing here, or refused.

It owns the order of the work, what is refused, and how the recipe is written; it must not know any tool's keys.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import ConfigError, listed, nearest_name
from halfbyte.foreign.draft import Draft, Line
from halfbyte.foreign.tools import TOOLS, tool_of
from halfbyte.settings import SECTIONS, SETTINGS, Config
from halfbyte.yaml_file import read_yaml

PATHS = ("model", "data.train", "data.eval")


@dataclass(frozen=True)
class Imported:
    """A recipe made of another tool's file.

    Attributes:
        tool: Title of the tool.
        source: The file.
        lines: Settings by dotted name, in the order of a recipe.
        idle: Keys that mean nothing here, and why.
        dropped: Keys that change the result and were dropped as asked for, and why they could not be taken.
        missing: Settings without a default that the file does not decide.
        notes: What a person should know or do.
    """

    tool: str
    source: Path
    lines: dict[str, Line]
    idle: dict[str, str]
    dropped: dict[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    def nested(self) -> dict[str, Any]:
        """The settings as in a recipe, without comments."""
        settings: dict[str, Any] = {}
        for name, line in self.lines.items():
            section, _, leaf = name.rpartition(".")
            (settings.setdefault(section, {}) if section else settings)[leaf] = line.value
        return settings

    def to_yaml(self) -> str:
        """The recipe, each line with the keys it came from."""
        text = [f"# {self.source.name} of {self.tool}, as a recipe of halfbyte."]
        text += [f"# {note}" for note in self.notes]
        section = ""
        for name, line in self.lines.items():
            of, _, leaf = name.rpartition(".")
            if of != section:
                text.append(f"{of}:")
                section = of
            comment = ", ".join(line.sources) + (": " if line.sources and line.remark else "") + line.remark
            text.append(f"{'  ' if of else ''}{leaf}: {_scalar(line.value)}  # {comment}")
        text += [f"# {name}: put it in, nothing says it" for name in self.missing]
        for heading, keys in (("Means nothing here", self.idle), ("Dropped, as asked for", self.dropped)):
            if keys:
                text.append(f"# {heading}:")
                text += [f"#   {', '.join(names)}: {why}" for why, names in by_reason(keys).items()]
        return "\n".join(text) + "\n"


def import_file(
    file: Path, tool: str | None = None, drop: Sequence[str] = (), folder: Path | None = None
) -> Imported:
    """Read a settings file of another tool.

    Args:
        file: YAML or JSON.
        tool: A key of `TOOLS`; None tells it by the file's keys.
        drop: Keys that may be left out although they change the result.
        folder: Where the recipe will lie, which its paths are relative to; None for the working folder.

    Raises:
        ConfigError: HB103 for an unreadable file, HB104 if its tool cannot be told, HB105 naming every key that
            changes the result and that nothing here does, HB106 for keys that contradict each other, HB107 for a key
            to drop that is not refused.
    """
    given = _read(file)
    chosen = TOOLS[tool or tool_of(given, str(file))]
    draft = Draft(chosen.title, given, (Path.cwd(), file.resolve().parent))
    draft.read(chosen.keys)
    chosen.rule(draft)
    _check(draft, file, drop)
    assert not draft.unaccounted(), draft.unaccounted()
    folder = (folder or Path.cwd()).absolute()
    lines = {name: _placed(draft.lines[name], name, folder) for name in SETTINGS if name in draft.lines}
    required = [f"{s}.{n}" for s, m in SECTIONS.items() for n, f in m.model_fields.items() if f.is_required()]
    required += [n for n, f in Config.model_fields.items() if f.is_required() and n not in SECTIONS]
    return Imported(
        chosen.title,
        file,
        lines,
        {key: why for key, why in draft.idle.items() if key not in draft.refused},
        {key: draft.refused[key] for key in drop},
        tuple(name for name in required if name not in lines),
        tuple(dict.fromkeys(draft.notes)),
    )


def _read(file: Path) -> dict[str, Any]:
    """The file's mapping."""
    if file.suffix != ".json":
        return read_yaml(file)[0]
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("HB103", f"not JSON: {error}", where=str(file), fix="mend the file") from error
    if not isinstance(given, dict):
        what = f"got {type(given).__name__}, expected a mapping of settings"
        raise ConfigError("HB103", what, where=str(file), fix="name a file of settings")
    return given


def _check(draft: Draft, file: Path, drop: Sequence[str]) -> None:
    """Refuse what would change the result in silence."""
    if draft.contradictions:
        raise ConfigError(
            "HB106",
            f"{len(draft.contradictions)} contradiction(s)" + listed(draft.contradictions),
            where=str(file),
            fix="leave one of the keys",
        )
    for key in drop:
        if key not in draft.refused:
            near = nearest_name(key, draft.refused)
            raise ConfigError(
                "HB107",
                f"{key!r} is not among the keys that are refused",
                where="--drop",
                fix=f"did you mean {near}?" if near else "leave --drop out",
            )
    if left := [f"`{key}`: {why}" for key, why in draft.refused.items() if key not in drop]:
        names = [key for key in draft.refused if key not in drop]
        raise ConfigError(
            "HB105",
            f"{len(left)} key(s) of {draft.title} change the result, and nothing here does them"
            + listed(left),
            where=str(file),
            fix="change them, or leave them out: " + " ".join(f"--drop {name}" for name in names),
        )


def _placed(line: Line, name: str, folder: Path) -> Line:
    """A line whose paths, where they are below the recipe's folder, are relative to it."""

    def placed(path: str) -> str:
        inside = Path(path).is_absolute() and Path(path).is_relative_to(folder)
        return Path(path).relative_to(folder).as_posix() if inside else path

    if name not in PATHS:
        return line
    paths = [placed(path) for path in line.value] if isinstance(line.value, list) else placed(line.value)
    return line._replace(value=paths[0] if isinstance(paths, list) and len(paths) == 1 else paths)


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def by_reason(keys: dict[str, str]) -> dict[str, list[str]]:
    """Keys that have one reason, together."""
    grouped: dict[str, list[str]] = {}
    for key, why in keys.items():
        grouped.setdefault(why, []).append(key)
    return grouped
