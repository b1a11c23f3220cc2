"""A recipe in the making: which setting came from which keys, and what became of the other keys.

It owns the account of every key; it must not know what any tool's keys mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import nearest_name
from halfbyte.foreign.keys import UNSET, Idle, Joint, Keys, Refused, Taken, UnreadError, meaning_of
from halfbyte.settings import SETTINGS

EMPTY = "left empty"


class Line(NamedTuple):
    """A setting of the recipe.

    Attributes:
        value: Its value.
        sources: The keys it came from; none for the other tool's default.
        remark: What else is to be said.
    """

    value: Any
    sources: tuple[str, ...]
    remark: str = ""


@dataclass
class Draft:
    """What has been made of a file so far.

    Attributes:
        title: Name of the tool, for people.
        given: The file's keys and values.
        places: Folders that its paths may be relative to.
        lines: Settings by dotted name.
        idle: Keys that mean nothing here, and why.
        refused: Keys that change the result and that nothing here does, and why.
        contradictions: Settings that two keys decide differently.
        notes: What a person should know or do.
    """

    title: str
    given: Mapping[str, Any]
    places: tuple[Path, ...]
    lines: dict[str, Line] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def by_default(self) -> str:
        """The remark on a setting that no key decides."""
        return f"default of {self.title}"

    def get(self, key: str) -> Any:
        """A key's value; None where it is missing or left empty."""
        value = self.given.get(key)
        return None if value == "" else value

    def read_as(self, key: str, read: Callable[[Any], Any]) -> Any:
        """A key's value through a reader; None where it is missing, or the reader refuses it."""
        if (value := self.get(key)) is None:
            return None
        try:
            return read(value)
        except UnreadError as error:
            self.refuse(key, f"{value!r} {error}")
            return None

    def on(self, key: str) -> bool:
        """Whether a key is given and true."""
        return str(self.get(key)).lower() == "true"

    def value(self, setting: str) -> Any:
        """A setting's value so far; None where it has none."""
        return self.lines[setting].value if setting in self.lines else None

    def set(self, setting: str, value: Any, *sources: str, remark: str = "") -> None:
        """Decide a setting; two keys that decide it differently are a contradiction.

        Args:
            setting: Dotted name.
            value: Its value.
            sources: Keys it comes from.
            remark: What else is to be said of it.
        """
        assert setting in SETTINGS, setting
        before = self.lines.get(setting)
        if before is not None and before.value != value:
            keys = " and ".join(f"{key}: {self.given.get(key)}" for key in (*before.sources, *sources))
            self.contradictions.append(f"`{setting}` is decided twice, by {keys}")
            return
        known = before.sources if before is not None else ()
        self.lines[setting] = Line(value, tuple(dict.fromkeys((*known, *sources))), remark)

    def default(self, setting: str, value: Any) -> None:
        """Decide a setting that no key decides as the other tool would."""
        if setting not in self.lines:
            self.lines[setting] = Line(value, (), self.by_default)

    def refuse(self, key: str, why: str) -> None:
        """Say that a key changes the result and cannot be taken."""
        self.refused[key] = why

    def ignore(self, why: str, *keys: str) -> None:
        """Say that keys, those of them that are given, mean nothing here."""
        self.idle |= {key: why for key in keys if self.get(key) is not None}

    def drop_section(self, section: str, why: str) -> None:
        """Take back the settings of a section: nothing would read them."""
        for setting in [name for name in self.lines if name.startswith(section)]:
            self.ignore(why, *self.lines.pop(setting).sources)

    def read(self, keys: Keys) -> None:
        """Give each key its meaning; what is `Joint` is left to the tool's rules."""
        for key, value in self.given.items():
            meaning = meaning_of(keys, key)
            if value is None or value == "":
                self.idle[key] = EMPTY
            elif meaning is None:
                near = nearest_name(key, keys)
                hint = f"; did you mean {near}?" if near else ""
                self.refuse(key, f"{self.title} has no such key that is known here{hint}")
            elif isinstance(meaning, Idle):
                self.idle[key] = meaning.why
            elif isinstance(meaning, Refused):
                self._weigh(key, value, meaning)
            elif isinstance(meaning, Taken):
                self._take(key, value, meaning)
            else:
                assert isinstance(meaning, Joint)

    def _weigh(self, key: str, value: Any, meaning: Refused) -> None:
        if value in meaning.harmless:
            self.idle[key] = "asks for nothing at this value"
        else:
            self.refuse(key, meaning.why)

    def _take(self, key: str, value: Any, meaning: Taken) -> None:
        read = self.read_as(key, meaning.read)
        if key in self.refused:
            return
        if read is UNSET:
            self.idle[key] = "not set at this value"
        else:
            self.set(meaning.setting, read, key)

    def unaccounted(self) -> list[str]:
        """Keys of which nothing has been said; the rules of a tool must leave none."""
        said = {key for line in self.lines.values() for key in line.sources} | {*self.idle, *self.refused}
        return [key for key in self.given if key not in said]
