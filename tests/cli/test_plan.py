"""Promises of `halfbyte plan`: a table, JSON, a recipe that loads, and refusals that help."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

from halfbyte.config import load_config
from halfbyte.errors import PlanError
from halfbyte.plan.memory import Runtime
from halfbyte.plan.probe import measure_runtime
from halfbyte.plan.terms import Memory
from halfbyte.report.memory_picture import PARTS, memory_picture

Call = Callable[..., Result]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a process of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "halfbyte.plan.calibrate.measure_runtime", lambda _: Runtime(4 * 10**8, 4 * 10**8, 4 * 10**8)
    )


@pytest.mark.usefixtures("quick")
def test_plan_recommends_and_writes_a_recipe(call: Call, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    done = call(
        "plan", model, "--tokens", "1e4", "--max-length", "64", "--memory-gb", "2", "--out", out, "--json"
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    names = [choice["name"] for choice in told["choices"]]
    assert {"full, keep", "lora, recompute", "qlora, stream"} <= set(names)
    config = load_config(out)
    assert config.method == told["recommended"].partition(",")[0]
    table = call("plan", model, "--tokens", "1e4", "--max-length", "64", "--memory-gb", "2")
    assert "Recommended" in table.stdout


@pytest.mark.usefixtures("quick")
def test_plan_refuses_with_the_nearest(call: Call, model: Path) -> None:
    done = call("plan", model, "--tokens", "1e4", "--max-length", "64", "--memory-gb", "0.1")
    assert done.exit_code == 1
    assert "HB703" in done.stderr
    assert "nearest" in done.stderr


@pytest.mark.parametrize("given", [("--deadline", "soon"), ("--tokens", "many")])
def test_plan_says_how_times_and_tokens_are_written(call: Call, model: Path, given: tuple[str, str]) -> None:
    done = call("plan", model, *given)
    assert done.exit_code == 1
    assert "HB706" in done.stderr


def test_a_folder_in_4_bits_is_not_tuned_in_16(call: Call, model: Path, tmp_path: Path, quick: None) -> None:
    assert call("quantize", model, tmp_path / "nf4").exit_code == 0
    done = call("plan", tmp_path / "nf4", "--tokens", "1e4", "--max-length", "64", "--json")
    told = json.loads(done.stdout)
    assert "4 bits" in told["not_possible"]["lora, keep"]  # HB705


def test_a_measure_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.plan.probe._SCRIPT", "raise SystemExit('no memory')")
    with pytest.raises(PlanError, match="HB701.*no memory"):
        measure_runtime(None)


def test_the_same_verb_looks_at_models_and_at_past_runs(call: Call, model: Path, tmp_path: Path) -> None:
    told = json.loads(call("plan", "--audit", model, "--json").stdout)
    assert [Path(each["folder"]).name for each in told["audits"]] == [model.name]
    (tmp_path / "runs").mkdir()
    assert json.loads(call("plan", "--history", tmp_path / "runs", "--json").stdout)["runs"] == []


@pytest.mark.parametrize("given", [(), ("a", "b"), ("--audit",), ("--audit", "--history", "a")])
def test_what_is_to_be_looked_at_is_named(call: Call, given: tuple[str, ...]) -> None:
    assert call("plan", *given).exit_code == 2


@pytest.mark.usefixtures("quick")
def test_the_picture_has_a_bar_for_each_way_and_the_limit(call: Call, model: Path, tmp_path: Path) -> None:
    given = ("--tokens", "1e4", "--max-length", "64", "--memory-gb", "2")
    done = call("plan", model, *given, "--picture", tmp_path / "deep/memory.svg", "--json")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "deep/memory.svg").read_text(encoding="utf-8")
    for choice in json.loads(done.stdout)["choices"]:
        assert f">{choice['name']}<" in text
    assert ">may be taken: 2.0 GB<" in text
    assert all(f">{part}<" in text for part in PARTS)
    assert "prefers-color-scheme:dark" in text
    assert "currentColor" in text
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep/memory.svg"]
    ElementTree.fromstring(text)


def test_a_bar_is_as_long_as_its_parts_together(tmp_path: Path) -> None:
    """The widths of the bars' parts are in the ratio of the numbers, and the file depends on these alone."""
    ways = {"one": Memory(10**9, 0, 0, 0, 10**9, 0, 0, 2 * 10**9)}
    first, second = (
        memory_picture(ways, 5 * 10**9, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")
    )
    assert first == second
    widths = [
        max(xs) - min(xs)
        for path in re.findall(rb'd="(M [^"]*z[^"]*)" clip-path', first)
        for xs in [[float(x) for x in re.findall(rb"[ML] ([\d.]+) ", path)]]
        if max(xs) > min(xs)
    ]
    assert widths[:3] == [pytest.approx(widths[0]), pytest.approx(widths[0]), pytest.approx(2 * widths[0])]
