"""Promises of the benchmarks' shared form: a missed floor fails, and nothing measured is lost or made up."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "figures.py"


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("figures", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["figures"]


def test_each_figure_is_one_line_of_json_and_one_row(
    figures: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(quick: bool) -> Iterator[object]:
        assert quick
        yield figures.Figure.at_least("speed", 2.5, "x", 1.5)
        yield figures.Figure("memory", None, "bytes")

    for _ in range(2):
        assert figures.run("demo", measure, ["--quick", "--results", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"claim": "speed", "figure": 2.5, "unit": "x", "floor": ">= 1.5", "ok": True}
    assert lines[1]["figure"] is None
    with (tmp_path / "demo.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["figure"] for row in rows] == ["2.5", "unknown"] * 2
    for fact in ("date", "machine", "versions", "revision", "quick"):
        assert rows[0][fact]


@pytest.mark.parametrize("figure", [1.49, math.nan, None])
def test_missed_floor_ends_with_status_one(figures: ModuleType, figure: float | None, tmp_path: Path) -> None:
    def measure(_: bool) -> Iterator[object]:
        yield figures.Figure.at_least("speed", figure, "x", 1.5)
        yield figures.Figure.at_most("error", 0.1, "", 0.2)

    assert figures.run("demo", measure, ["--results", str(tmp_path)]) == 1
    assert not figures.Figure.at_most("error", math.nan, "", 0.2).ok
    assert not figures.Figure.at_most("error", 0.21, "", 0.2).ok


def test_measuring_nothing_is_no_success(figures: ModuleType, tmp_path: Path) -> None:
    assert figures.run("demo", lambda _: iter(()), ["--results", str(tmp_path)]) == 1


def test_sides_are_timed_in_turn(figures: ModuleType) -> None:
    calls: list[str] = []
    found = figures.time_sides(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1, calls=2
    )
    assert calls == ["a", "a", "b", "b"] * 4
    assert set(found) == {"a", "b"}
    assert all(0.0 <= seconds < 1.0 for seconds in found.values())
