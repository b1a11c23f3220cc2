"""Promises of the settings: each one is read somewhere, and the schema printed says what a recipe may hold."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.settings import SECTIONS, SETTINGS, Config
from halfbyte.yaml_file import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "halfbyte").rglob("*.py"))
# Where settings are declared, found and listed; to stand there is not to be read.
DECLARING = {"settings.py", "config.py", "cli/settings.py"}
RECIPES = sorted((ROOT / "examples").rglob("recipe*.yaml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def reading_trees() -> list[ast.Module]:
    package = ROOT / "src" / "halfbyte"
    chosen = [
        p
        for p in SOURCES
        if p.relative_to(package).as_posix() not in DECLARING and p.parent.name != "foreign"
    ]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in chosen]


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def unread(settings: Iterable[str], trees: list[ast.Module]) -> list[str]:
    """Settings that no code asks for: `config.name`, `config.section.name`, or all of a section at once.

    A section that is handed over whole, as `**section.model_dump()`, is read where any attribute has the name.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    handed_over = {last_name(node.value) for node in attributes if node.attr == "model_dump"}
    asked = {(last_name(node.value), node.attr) for node in attributes}
    anywhere = {node.attr for node in attributes}

    def is_read(setting: str) -> bool:
        section, _, leaf = setting.rpartition(".")
        if section in handed_over:
            return leaf in anywhere
        return any((of, leaf) in asked for of in ("config", "settings", section))

    return [setting for setting in settings if not is_read(setting)]


def test_every_setting_is_read_somewhere() -> None:
    assert unread(SETTINGS, reading_trees()) == []


def test_a_setting_that_nothing_reads_is_seen() -> None:
    source = "def f(config):\n    return config.train.epochs, other.batch_size, Spec(**config.lora.model_dump()), x.r"
    settings = ("train.epochs", "train.batch_size", "lora.r", "lora.alpha")
    assert unread(settings, [ast.parse(source)]) == ["train.batch_size", "lora.alpha"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """What `halfbyte config schema --json` prints."""
    printed = CliRunner().invoke(app, ["config", "schema", "--json"])
    found = json.loads(printed.stdout)
    assert isinstance(found, dict)
    return found


def resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema with its reference followed."""
    name = part.get("$ref", "").removeprefix("#/$defs/")
    return schema["$defs"][name] if name else part


def faults(value: Any, part: dict[str, Any], schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Where a value is not what a schema says: types, choices, ranges, known and required names."""
    part = resolved(part, schema)
    if choices := part.get("anyOf"):
        if all(list(faults(value, choice, schema)) for choice in choices):
            yield f"{at}: {value!r} is none of the choices"
        return
    types: dict[str, tuple[type, ...]] = {
        "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
        "array": (list,), "object": (dict,), "null": (type(None),),
    }  # fmt: skip
    kind = part.get("type")
    if kind and (not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{at}: {value!r} is no {kind}"
        return
    if value not in part.get("enum", [value]) or part.get("const", value) != value:
        yield f"{at}: {value!r} is not allowed"
    if kind in {"integer", "number"} and not part.get("minimum", value) <= value <= part.get(
        "maximum", value
    ):
        yield f"{at}: {value!r} is out of range"
    if "exclusiveMinimum" in part and value <= part["exclusiveMinimum"]:
        yield f"{at}: {value!r} is out of range"
    if kind == "array":
        for number, item in enumerate(value):
            yield from faults(item, part["items"], schema, f"{at}[{number}]")
    if kind == "object":
        known = part["properties"]
        yield from (f"{at}.{name} is missing" for name in part.get("required", ()) if name not in value)
        for name, item in value.items():
            if name not in known:
                yield f"{at}.{name} is unknown"
            else:
                yield from faults(item, known[name], schema, f"{at}.{name}")


def settings_of(text: str) -> dict[str, Any]:
    """A recipe as the schema sees it: one file of rows is a list of one."""
    given = yaml.safe_load(text)
    for name in {"train", "eval"} & given["data"].keys():
        if isinstance(given["data"][name], str):
            given["data"][name] = [given["data"][name]]
    return given


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_fit_the_schema(recipe: Path, schema: dict[str, Any]) -> None:
    given, _ = read_yaml(recipe)
    assert list(faults(settings_of(yaml.safe_dump(given)), schema, schema)) == []


def test_the_recipe_of_the_readme_fits_the_schema(schema: dict[str, Any]) -> None:
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    given = settings_of(recipe.replace("2e-3", "0.002"))  # YAML 1.1 of others takes 2e-3 for text
    assert list(faults(given, schema, schema)) == []


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train", "epochs", "two"),
        ("train", "epochs", 0),
        ("train", "packing", 1),
        ("train", "schedule", "rex"),
        ("train", "warmup_ratio", 1.5),
        ("train", "lerning_rate", 1),
        ("quantization", "blocksize", 63),
        ("lora", "target_modules", [1]),
    ],
)
def test_a_recipe_that_does_not_fit_the_schema_is_seen(
    schema: dict[str, Any], section: str, name: str, value: object
) -> None:
    given = {"model": "m", "data": {"train": ["a"]}, section: {name: value}}
    assert len(list(faults(given, schema, schema))) == 1
    assert list(faults({"data": {}}, schema, schema)) == [".data.train is missing", ".model is missing"][::-1]


def test_every_setting_has_a_description_in_the_schema(schema: dict[str, Any]) -> None:
    bare = []
    for setting in SETTINGS:
        section, _, leaf = setting.rpartition(".")
        part = resolved(schema["properties"][section], schema) if section else schema
        if not part["properties"][leaf].get("description"):
            bare.append(setting)
    assert bare == []
    assert set(SECTIONS) < set(schema["properties"]) == set(Config.model_fields)
