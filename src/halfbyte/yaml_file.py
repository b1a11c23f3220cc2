"""A YAML file of settings as a mapping, with the line of each setting.

It owns the dialect (numbers as in JSON too, no key twice) and what is said of a faulty file; it must not know
what any setting means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import ConfigError


class Loader(yaml.SafeLoader):
    """YAML whose numbers are those of JSON too (`1e-4` is one), and whose mappings name each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key that is given twice is a fault."""
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                twice = f"key {name!r} is given twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A settings file's mapping, and the line of each setting by dotted name."""
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.load(text, Loader=Loader)
        root = yaml.compose(text, Loader=Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError("HB103", reason, where=str(file), fix="name a YAML file in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError("HB103", f"not YAML: {problem}", where=where, fix="mend the file") from error
    if not isinstance(settings, dict) or not isinstance(root, yaml.MappingNode):
        got = "nothing" if settings is None else type(settings).__name__
        what = f"got {got}, expected a mapping of settings"
        raise ConfigError("HB103", what, where=str(file), fix="start with `model: path/to/folder`")
    return settings, dict(_setting_lines(root, ""))


def _setting_lines(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _setting_lines(value, f"{name}.")
