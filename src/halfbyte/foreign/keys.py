"""What a key of another tool can mean here, and how its values are read.

It owns the kinds of meaning and the readers of values; it must not know any tool's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

UNSET = object()
"""What a reader returns for a value that says "not set", such as transformers' `max_steps: -1`."""


class UnreadError(Exception):
    """A value that nothing here does; its text says why."""


def same(value: Any) -> Any:
    """The value as it is."""
    return value


@dataclass(frozen=True)
class Taken:
    """The key becomes a setting.

    Attributes:
        setting: Ours, dotted.
        read: Our value from theirs; raises `UnreadError` where nothing here does it.
    """

    setting: str
    read: Callable[[Any], Any] = same


@dataclass(frozen=True)
class Joint:
    """The key is read together with others by the rules of its tool.

    Attributes:
        setting: The setting it decides first of all.
    """

    setting: str


@dataclass(frozen=True)
class Idle:
    """The key means nothing here.

    Attributes:
        why: Why the result does not depend on it.
    """

    why: str


@dataclass(frozen=True)
class Refused:
    """The key changes the result, and nothing here does what it asks for.

    Attributes:
        why: What is missing here.
        harmless: Values with which it asks for nothing.
    """

    why: str
    harmless: tuple[object, ...] = (False,)


Meaning = Taken | Joint | Idle | Refused
Keys = dict[str, Meaning]


def idle(why: str, names: str) -> Keys:
    """Names, divided by blanks, that mean nothing for one reason; one that ends in * stands for all it begins."""
    return {name: Idle(why) for name in names.split()}


def refused(why: str, names: str, *harmless: object) -> Keys:
    """Names, divided by blanks, that are refused for one reason, but for harmless values; False always is one."""
    return {name: Refused(why, (False, *harmless)) for name in names.split()}


def meaning_of(keys: Keys, name: str) -> Meaning | None:
    """What a name means, also by what it begins with; None where it is unknown."""
    if name in keys:
        return keys[name]
    begins = [k for k in keys if k.endswith("*") and name.startswith(k[:-1])]
    return keys[max(begins, key=len)] if begins else None


def number(value: Any) -> float:
    """A number, also one in quotes."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        return float(str(value))
    except ValueError:
        raise UnreadError("is no number") from None


def whole(value: Any) -> int:
    """A whole number, also one in quotes or with a point."""
    read = number(value)
    if read != int(read):
        raise UnreadError("is no whole number")
    return int(read)


def flag(value: Any) -> bool:
    """A yes or no, also in quotes."""
    text = str(value).lower()
    if text not in {"true", "false"}:
        raise UnreadError("is neither true nor false")
    return text == "true"


def above_zero(value: Any) -> object:
    """A whole number from 1; none where it is 0 or less."""
    read = whole(value)
    return read if read > 0 else UNSET


def clipping(value: Any) -> float | None:
    """A norm to clip gradients to; None where it is 0."""
    return number(value) or None


def name_list(value: Any) -> list[str]:
    """Names in a list, or in a text with commas between them."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [name for part in parts if (name := str(part).strip())]


def filled(value: Any) -> Any:
    """A list or mapping; none where it is empty."""
    return value or UNSET


def beginning(value: Any) -> object:
    """How an adapter begins, in PEFT's words; none for PEFT's default."""
    if value is True:
        return UNSET
    name = "pissa" if str(value).startswith("pissa_niter_") else value
    return one_of({n: n for n in ("gaussian", "pissa", "loftq")})(name)


def one_of(choices: dict[str, str]) -> Callable[[Any], str]:
    """A reader that takes their names for ours."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise UnreadError(f"is none of {', '.join(choices)}")
        return choices[value]

    return read


def dtype(value: Any) -> str:
    """A computing type, with or without torch in front."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    name = str(value).removeprefix("torch.")
    return one_of({n: n for n in ("bfloat16", "float16", "float32")})(names.get(name, name))
