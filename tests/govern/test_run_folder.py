"""Promises of the run's folder: its log, its phases, whole files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.errors import ConfigError
from halfbyte.govern.run_folder import EVENTS, RunFolder


def _events(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / EVENTS).read_text(encoding="utf-8").splitlines()
    return [(event["event"], event["state"]) for event in map(json.loads, lines)]


def test_phases_are_logged_and_timed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a" / "run")
    with folder.phase("train"):
        pass
    assert _events(folder.path) == [("run", "begun"), ("train", "begun"), ("train", "done")]
    assert folder.seconds["train"] >= 0


def test_a_failing_phase_is_logged_as_failed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    with pytest.raises(KeyboardInterrupt), folder.phase("train"):
        raise KeyboardInterrupt
    assert _events(tmp_path)[-1] == ("train", "failed")
    assert "train" not in folder.seconds


def test_files_are_written_whole_and_never_with_nan(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path)
    folder.write_json("eval/a.json", {"é": 1})
    assert json.loads((tmp_path / "eval" / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write_json("eval/a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "eval" / "a.json").read_text(encoding="utf-8")) == {"é": 1}
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["a.json"]


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"HB120[\s\S]*is a file"):
        RunFolder.create(tmp_path / "run", overwrite=True)


def test_overwriting_follows_no_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine", encoding="utf-8")
    run = RunFolder.create(tmp_path / "run")
    (run / "adapter").symlink_to(tmp_path / "precious")
    RunFolder.create(tmp_path / "run", overwrite=True)
    assert (tmp_path / "precious" / "file").exists()
    assert not (run / "adapter").exists()


def test_a_run_that_failed_before_training_may_be_begun_again(tmp_path: Path) -> None:
    RunFolder.create(tmp_path).write_text("config.yaml", "seed: 1")
    RunFolder.create(tmp_path)
    assert not (tmp_path / "config.yaml").exists()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="HB120"):
        RunFolder.create(tmp_path)
