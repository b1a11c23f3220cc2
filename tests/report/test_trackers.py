"""Promises of exporters, held against the real ones: they hear every step, and none of them can end a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config import load_config
from halfbyte.errors import ConfigError, EvaluateError
from halfbyte.pipeline import rehearse, run
from halfbyte.report.trackers import TRACKERS, Tracked, Tracker, flat
from halfbyte.settings import Config
from halfbyte.train.display import Silent
from halfbyte.train.metrics import StepRecord

RECORD = StepRecord(1, 0.5, 2.0, 1e-3, 0.7, 10, 20, 2, 0.9, 100.0, 0.2, None, held_out_loss=1.5)
HEARD = ("loss", "lr", "grad_norm", "tokens_per_s")


@pytest.fixture
def config(tmp_path: Path, shared: Callable[[str], Path]) -> Callable[..., Config]:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} and", "completion": f" {n + 1}"} for n in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def build(*report_to: str) -> Config:
        base: dict[str, Any] = {
            "model": str(shared("models/stories260K-hf")),
            "output_dir": str(tmp_path / "run"),
            "forecast": False,
            "data": {"train": str(file), "eval_fraction": 0.0},
            "train": {"max_steps": 3, "batch_size": 2, "report_to": list(report_to)},
        }
        return load_config(None, (), base)

    return build


@pytest.fixture
def steps(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    file = tmp_path / "run" / "metrics.jsonl"
    return lambda: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_tensorboard_reads_every_step(config: Callable[..., Config], steps: Callable[[], list[Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(config("tensorboard"), evaluate=False).folder
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in HEARD:
        heard = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/{name}")]
        assert heard == [(s["step"], pytest.approx(s[name], rel=1e-6)) for s in steps()]
    assert "text_summary" in str(events.Tags()["tensors"])


def test_mlflow_keeps_every_step_and_the_settings(
    config: Callable[..., Config],
    steps: Callable[[], list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "orders")
    folder = run(config("mlflow"), evaluate=False).folder
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("orders").experiment_id])
    assert found.info.run_id == json.loads((folder / "trackers.json").read_text(encoding="utf-8"))["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["train.max_steps"] == "3"
    for name in HEARD:
        heard = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        assert heard == [(s["step"], pytest.approx(s[name])) for s in steps()]


def test_wandb_writes_every_step_without_a_network(
    config: Callable[..., Config], steps: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = run(config("wandb"), evaluate=False).folder
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert json.loads((folder / "trackers.json").read_text(encoding="utf-8"))["wandb"] in file.name
    content = file.read_bytes()
    for step in steps():
        for name in HEARD:
            assert json.dumps(step[name]).encode() in content


class _Broken(Tracker):
    package = "none"

    def start(self) -> None:
        self.id = "known"

    def step(self, step: int, numbers: Any) -> None:
        raise ConnectionError("the server is away")

    def stop(self) -> None:
        raise AssertionError("left out by then")


class _Heard(Tracker):
    package = "none"

    def start(self) -> None:
        self.told: list[Any] = []

    def step(self, step: int, numbers: Any) -> None:
        self.told.append((step, dict(numbers)))

    def stop(self) -> None:
        self.told.append("stop")


def test_an_exporter_that_fails_is_left_out_and_the_others_go_on(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    notes: list[str] = []
    heard = _Heard(config(), tmp_path, None)
    display = Tracked(
        Silent(), {"broken": _Broken(config(), tmp_path, None), "heard": heard}, tmp_path, notes.append
    )
    display.start(2)
    display.step(RECORD)
    display.step(RECORD)
    display.stop()
    assert notes == ["broken is told nothing from here on: ConnectionError: the server is away"]
    numbers = {"loss": 2.0, "held_out_loss": 1.5}
    assert [told[1] | numbers == told[1] for told in heard.told[:2]] == [True, True]
    assert heard.told[2:] == ["stop"]
    assert json.loads((tmp_path / "trackers.json").read_text(encoding="utf-8")) == {"broken": "known"}


@pytest.mark.parametrize("attempt", [run, rehearse])
def test_a_missing_package_is_refused_before_any_work(
    config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attempt: Callable[[Config], Any],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluateError, match=r"HB606[\s\S]*pip install mlflow-skinny"):
        attempt(config("mlflow"))
    assert not (tmp_path / "run").exists()


def test_names_are_those_of_the_settings(config: Callable[..., Config]) -> None:
    for name in TRACKERS:
        assert config(name).train.report_to == [name]
    with pytest.raises(ConfigError, match="HB102"):
        config("comet")


def test_settings_are_told_by_their_dotted_names() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": [3]}}}) == {"a": 1, "b.c": 2, "b.d.e": [3]}
