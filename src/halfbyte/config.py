"""Settings from a file and overrides, as one `Config`: every fault named at once, with its line.

It owns how settings are found, merged and refused; it must not know what a setting means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from halfbyte.errors import ConfigError, listed, nearest_name
from halfbyte.foreign.tools import FOREIGN_NAMES
from halfbyte.settings import SECTIONS, SETTINGS, Config
from halfbyte.yaml_file import Loader, read_yaml

# pydantic's names of the faults that mean an unknown setting.
UNKNOWN_KINDS = ("extra_forbidden", "invalid_key")


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> Config:
    """Read, merge and validate the settings; later ones win: base, file, overrides.

    Model and data paths of the file are taken relative to its folder, all others to the working folder; the
    result holds these absolute.

    Args:
        path: YAML file, or None for none.
        overrides: Settings like `train.learning_rate=1e-4`; values are read as YAML.
        base: Settings beneath the file's, nested as in the file.

    Raises:
        ConfigError: HB101 for unknown settings, HB102 for bad values, HB103 for an unreadable file. HB101 and
            HB102 list every fault of every setting.
    """
    merged: dict[str, Any] = {}
    lines: dict[str, int] = {}
    _merge(merged, _absolute_paths(base or {}, Path.cwd()))
    if path is not None:
        file = Path(path)
        settings, lines = read_yaml(file)
        _merge(merged, _absolute_paths(settings, file.resolve().parent))
    faults = []
    for override in overrides:
        try:
            setting, nested = _parse_override(override)
        except ValueError as error:
            faults.append(str(error))
            continue
        _merge(merged, _absolute_paths(nested, Path.cwd()))
        lines.pop(setting, None)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise _config_error(error, faults, path, lines) from None
    if faults:
        raise ConfigError("HB102", f"{len(faults)} fault(s)" + listed(faults), fix="write section.name=value")
    return config


CHANGEABLE = ("output_dir", "forecast", "train.log_steps", "train.save_steps", "train.save_total_limit")
"""What says nothing about the weights, as all of `evaluate` and `cost` does: a run may go on with others."""


def refuse_other_settings(config: Config, earlier: Config) -> None:
    """Refuse to go on with a run under settings that would have led it elsewhere.

    Args:
        config: Settings to go on with.
        earlier: Settings that the run began with.

    Raises:
        ConfigError: HB121 naming every setting that differs and both values.
    """
    now, then = (_flat(settings.model_dump(exclude={"evaluate", "cost"})) for settings in (config, earlier))
    for settings in (now, then):
        if settings["train.activations"] == "disk":
            settings["train.activations"] = "exact"  # the same bits
    differ = [n for n in now if n not in CHANGEABLE and now[n] != then.get(n)]
    if differ:
        faults = [f"`{name}` was {then.get(name)!r}, is {now[name]!r}" for name in differ]
        raise ConfigError(
            "HB121",
            f"{len(differ)} setting(s) differ from those that the run began with" + listed(faults),
            where=earlier.output_dir,
            fix="resume with the earlier settings, or begin a new run in another output_dir",
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {
        f"{key}.{name}" if isinstance(value, Mapping) else key: inner
        for key, value in settings.items()
        for name, inner in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Lay settings over others, section by section."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _absolute_paths(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with the paths of what is read made absolute; what is no path is left for validation."""

    def absolute(value: object) -> object:
        if isinstance(value, list):
            return [absolute(item) for item in value]
        return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) else value

    changed = dict(settings)
    if "model" in changed:
        changed["model"] = absolute(changed["model"])
    if isinstance(data := changed.get("data"), Mapping):
        changed["data"] = {k: absolute(v) if k in ("train", "eval", "cache") else v for k, v in data.items()}
    return changed


def _parse_override(override: str) -> tuple[str, dict[str, Any]]:
    """`section.name=value` as name and nested mapping; ValueError says what is wrong with it."""
    setting, equals, text = override.partition("=")
    keys = setting.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"override {override!r}: expected section.name=value")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML") from error
    for key in reversed(keys):
        value = {key: value}
    return setting.strip(), value


def _config_error(
    error: ValidationError, faults: list[str], path: str | Path | None, lines: Mapping[str, int]
) -> ConfigError:
    """All faults of the settings as one error, each with its line where it has one."""
    unknown = False
    reasons: dict[str, list[str]] = {}
    got: dict[str, object] = {}
    for fault in error.errors(include_url=False):
        between = fault.get("ctx", {})  # a fault between two sections names its setting itself
        setting = between.get("setting") or _setting_of(fault["loc"], fault["type"])
        if fault["type"] in UNKNOWN_KINDS:
            unknown = True
            reasons[setting] = [_unknown(setting)]
            continue
        if fault["type"] == "missing":
            reasons[setting] = ["is missing and has no default"]
            continue
        got[setting] = between.get("got", fault["input"])
        expected = fault["msg"].removeprefix("Input should be ")
        if fault["type"] == "model_type":
            expected = "a mapping of settings"
        reasons.setdefault(setting, []).append(expected)
    for setting, texts in reasons.items():
        line = f"line {lines[setting]}: " if setting in lines else ""
        text = " or ".join(dict.fromkeys(texts))
        faults.append(
            f"{line}`{setting}` " + (f"got {got[setting]!r}, expected {text}" if setting in got else text)
        )
    return ConfigError(
        "HB101" if unknown else "HB102",
        f"{len(faults)} fault(s)" + listed(faults),
        where=str(path) if path is not None else "",
        fix="mend each setting named",
    )


def _setting_of(loc: tuple[int | str, ...], kind: str) -> str:
    """The dotted setting a validation fault is about, without the union branches pydantic appends."""
    names = [str(part) for part in loc]
    dotted = ".".join(names[:2])
    if kind in UNKNOWN_KINDS or dotted in SETTINGS:
        return dotted
    return names[0]


def _unknown(setting: str) -> str:
    """What to say of an unknown setting: the one that was probably meant."""
    section, _, leaf = setting.rpartition(".")
    anywhere = dict(FOREIGN_NAMES)
    for known in reversed((*SETTINGS, *SECTIONS)):  # the first section that has a name wins it
        anywhere[_leaf(known)] = known
    if leaf in anywhere:
        return f"is unknown, did you mean `{anywhere[leaf]}`?"
    beside = {_leaf(known): known for known in (*SETTINGS, *SECTIONS) if known.rpartition(".")[0] == section}
    foreign = {name: target for name, target in FOREIGN_NAMES.items() if target.rpartition(".")[0] == section}
    for names in ({**foreign, **beside}, anywhere):
        if (near := nearest_name(leaf, names)) is not None:
            return f"is unknown, did you mean `{names[near]}`?"
    return f"is unknown; known here: {', '.join(beside or (*SETTINGS, *SECTIONS))}"


def _leaf(setting: str) -> str:
    return setting.rpartition(".")[2]
