"""The two files in which a run says what it was to take and what it took: plan.json and ledger.json.

It owns their content and their reading, which trusts no file that is torn, edited or of something else; it must not
know how anything is measured or forecast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from halfbyte.plan.terms import Estimate, Forecast

PLAN = "plan.json"
LEDGER = "ledger.json"
VERSION = 1
DIGEST = "sha256"
Read = TypeVar("Read")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Factors:
    """What a machine's forecasts are multiplied with, from what its runs took.

    Attributes:
        time: Of the seconds.
        runtime: Of `Memory.runtime`.
        runs: Runs they rest on; 0 where there were too few.
        why: Why they are 1; empty where they are not taken for granted.
        spread: Least and largest ratio of time among those runs, then of runtime memory.
    """

    time: float = 1.0
    runtime: float = 1.0
    runs: int = 0
    why: str = "nothing was measured yet"
    spread: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 1.0), (1.0, 1.0))

    __pydantic_config__ = _STRICT

    def described(self) -> str:
        """The correction in a few words."""
        return f"time × {self.time:.3f}, runtime memory × {self.runtime:.3f}, from {self.runs} runs like this one"


@dataclass(frozen=True)
class Planned:
    """plan.json: a forecast as it was made.

    Attributes:
        forecast: None where none was made.
        factors: What it was multiplied with already.
        why: Why none was made; empty where one was.
    """

    forecast: Forecast | None = None
    factors: Factors = field(default_factory=Factors)
    why: str = ""

    __pydantic_config__ = _STRICT

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with their digest."""
        forecast = None if self.forecast is None else self.forecast.as_dict()
        return _signed(
            {"version": VERSION, "forecast": forecast, "factors": asdict(self.factors), "why": self.why}
        )


@dataclass(frozen=True)
class Peak:
    """The most memory a process held at once.

    Attributes:
        nbytes: In all; None where the system does not say.
        anon: Of it, memory of its own, at the fullest moment that was looked at.
        file: Of it, pages of mapped files.
        shmem: Of it, memory shared with other processes.
        method: How it was got.
    """

    nbytes: int | None
    anon: int | None
    file: int | None
    shmem: int | None
    method: str

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class Ledger:
    """ledger.json: what a run took.

    Attributes:
        state: How it ended.
        error: What stopped it: a code or an exception's name; empty where it is done.
        began: When, in UTC.
        seconds: Wall time, loading and measuring included.
        memory: Highest resident memory.
        parts: Bytes of `Memory`'s parts, as far as they were counted.
        resumed_after: Step after which it went on from a checkpoint; 0 from the beginning.
        steps: Optimizer steps since then.
        step_seconds: Median time of one, the first left out; None with fewer than two.
        training_seconds: Time of all these steps.
        tokens: Tokens of these steps.
        energy: Wh of this process's part of the machine, or of the machine, as its source says.
        cost: In a currency.
        co2: In g.
        counters: What the energy counters counted, or why they did not.
        written_bytes: Sent to disks; None where the system or the file system does not count.
        folder_bytes: What lies in the run's folder.
        machine: What it ran on.
        versions: Of this package and those it stands on.
        settings_sha256: Digest of the resolved settings.
        earlier: Ledgers of the same run before it was interrupted, oldest first.
    """

    state: Literal["done", "interrupted", "failed"]
    error: str
    began: str
    seconds: float
    memory: Peak
    parts: dict[str, int]
    resumed_after: int
    steps: int
    step_seconds: float | None
    training_seconds: float
    tokens: int
    energy: Estimate
    cost: Estimate
    co2: Estimate
    counters: dict[str, str]
    written_bytes: int | None
    folder_bytes: int
    machine: dict[str, str | int | None]
    versions: dict[str, str | None]
    settings_sha256: str
    earlier: list[dict[str, Any]] = field(default_factory=list)

    __pydantic_config__ = _STRICT

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, with their digest."""
        plain = {
            name: value._asdict() if isinstance(value, Estimate) else value
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
        }
        return _signed({"version": VERSION, **plain, "memory": asdict(self.memory)})

    @property
    def machine_key(self) -> tuple[object, ...]:
        """What must be the same for two runs to be compared: processor, cores, and this package's version."""
        return (self.machine.get("processor"), self.machine.get("cores"), self.versions.get("halfbyte"))


@dataclass(frozen=True)
class Refused:
    """A file that was not read.

    Attributes:
        file: The file.
        why: What is wrong with it.
    """

    file: Path
    why: str


def read_ledger(folder: Path) -> Ledger | Refused | None:
    """What a run took; the reason if its ledger cannot be trusted, None if it has none.

    Args:
        folder: The run's folder.
    """
    content = _read(folder / LEDGER)
    if not isinstance(content, dict):
        return content
    return _checked(folder / LEDGER, _form_of(Ledger), content)


def read_plan(folder: Path) -> Planned | Refused | None:
    """What was forecast of a run; the reason if that cannot be trusted, None if there is no plan.json.

    Args:
        folder: The run's folder.
    """
    content = _read(folder / PLAN)
    if not isinstance(content, dict):
        return content
    if isinstance(forecast := content.get("forecast"), dict) and isinstance(forecast.get("memory"), dict):
        forecast["memory"].pop("total", None)
    return _checked(folder / PLAN, _form_of(Planned), content)


@cache
def _form_of(kind: type[Read]) -> TypeAdapter[Read]:
    """Made once: it takes longer than reading many files."""
    return TypeAdapter(kind)


def _signed(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, DIGEST: _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path) -> dict[str, Any] | Refused | None:
    """A signed file's content without version and digest."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as fault:
        return Refused(file, f"it is not JSON: {fault}")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return Refused(file, f"it is not of version {VERSION}")
    digest = content.pop(DIGEST, None)
    if digest != _digest(content):
        return Refused(file, "its digest is not that of its content: it was edited or torn")
    del content["version"]
    return content


def _checked(file: Path, kind: TypeAdapter[Read], content: dict[str, Any]) -> Read | Refused:
    try:
        return kind.validate_json(json.dumps(content))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        return Refused(file, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
