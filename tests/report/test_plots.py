"""Promises of the loss curve: drawn from any run's metrics, the same bytes each time, honest about gaps."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import EvaluateError
from halfbyte.report.plots import loss_curve, read_curve, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def metrics(tmp_path: Path) -> Callable[..., Path]:
    def write(losses: list[float], *extra: str) -> Path:
        path = tmp_path / "metrics.jsonl"
        lines = [
            json.dumps({"step": i, "loss": x, "lr": 1e-3 / i, "tokens": 9}) for i, x in enumerate(losses, 1)
        ]
        path.write_text("\n".join([*lines, *extra]) + "\n", encoding="utf-8")
        return path

    return write


def test_curve_is_drawn_as_svg_and_png(metrics: Callable[..., Path], tmp_path: Path) -> None:
    svg, png = loss_curve(metrics([4.0, 3.0, 2.5, 2.4]), tmp_path / "plots" / "loss.v1", title="orders")
    assert (svg.name, png.name) == ("loss.v1.svg", "loss.v1.png")
    text = svg.read_text(encoding="utf-8")
    for label in (
        "orders",
        "optimizer step",
        "loss (nats per trained token)",
        "learning rate",
        "loss, smoothed",
    ):
        assert label in text
    assert png.read_bytes().startswith(PNG)
    assert {each.name for each in svg.parent.iterdir()} == {svg.name, png.name}


def test_svg_has_the_same_bytes_each_time(metrics: Callable[..., Path], tmp_path: Path) -> None:
    path = metrics([4.0, 3.0, 2.5, 2.4])
    first, second = (loss_curve(path, tmp_path / name)[0].read_bytes() for name in ("a", "b"))
    assert first == second
    assert loss_curve(metrics([4.0, 3.0, 2.5, 2.3]), tmp_path / "c")[0].read_bytes() != first


@pytest.mark.parametrize("losses", [[3.0], [3.0, math.nan, 2.0], [1e-9, 2e-9]])
def test_short_and_broken_runs_are_drawn_too(
    losses: list[float], metrics: Callable[..., Path], tmp_path: Path
) -> None:
    svg, _ = loss_curve(metrics(losses), tmp_path / "loss")
    assert svg.stat().st_size > 1000


def test_numbers_are_those_of_the_file(metrics: Callable[..., Path]) -> None:
    curve = read_curve(metrics([4.0, 3.5], ""))
    assert curve.step.tolist() == [1.0, 2.0]
    assert curve.loss.tolist() == [4.0, 3.5]
    assert curve.lr.tolist() == [1e-3, 5e-4]


def test_lines_that_are_no_metrics_are_all_named(metrics: Callable[..., Path]) -> None:
    path = metrics([4.0], "{", '{"step": 3}', "[1]", '{"step": 4, "loss": 3.0, "lr": 0.1}')
    with pytest.raises(EvaluateError, match="HB605") as caught:
        read_curve(path)
    for part in ("3 lines", "line 2", "line 3", "line 4", str(path)):
        assert part in str(caught.value)
    assert "line 5" not in str(caught.value)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="HB605"):
        read_curve(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(EvaluateError, match="HB605"):
        read_curve(tmp_path / "empty.jsonl")


def test_without_matplotlib_the_user_is_told_what_to_install(
    metrics: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluateError, match="HB606") as caught:
        loss_curve(metrics([4.0]), tmp_path / "loss")
    assert "halfbyte[report]" in str(caught.value)


def test_smoothing_keeps_a_level_and_passes_over_gaps() -> None:
    level = np.full(50, 3.0)
    level[7] = math.nan
    assert smoothed(level, 2.0) == pytest.approx(np.full(50, 3.0))
    assert np.isnan(smoothed(np.full(4, math.nan), 1.0)).all()


def test_smoothing_follows_a_slope_without_lag_and_dampens_noise() -> None:
    slope = np.arange(100.0)
    assert smoothed(slope, 3.0)[20:80] == pytest.approx(slope[20:80])
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise, 4.0).std() < 0.5 * noise.std()
