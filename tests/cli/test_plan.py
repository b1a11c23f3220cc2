"""Promises of `halfbyte plan`: a table, JSON, a recipe that loads, and refusals that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from halfbyte.config import load_config
from halfbyte.errors import PlanError
from halfbyte.plan.memory import Runtime
from halfbyte.plan.probe import measure_runtime

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
