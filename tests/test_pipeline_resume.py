"""Promises of a run that was cut: it goes on to the same bits, and only where it is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tests.short_runs import VARIED, Make, Shared, read_lines, settings_in

from halfbyte.errors import ConfigError
from halfbyte.pipeline import run
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.train.display import Display, Silent
from halfbyte.train.metrics import StepRecord


@pytest.fixture
def make(tmp_path: Path, shared: Shared) -> Make:
    """Builds the settings of a run that takes about a second."""
    return settings_in(tmp_path, shared)


def _cut(config: Config, after: int) -> None:
    """A run that ends, as in a crash, when a step is done."""

    class Cut(Watch):
        def training(self, every: int) -> Display:
            return Crash()

    class Crash(Silent):
        def step(self, record: StepRecord) -> None:
            if record.step == after:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config, watch=Cut())


@pytest.mark.parametrize("lora", [(), VARIED], ids=["plain", "varied"])
def test_a_cut_run_goes_on_to_the_same_adapter_and_summary(
    make: Make, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    whole = run(make("train.save_steps=2", f"output_dir={tmp_path / 'whole'}", *lora))
    config = make("train.save_steps=2", *lora)
    _cut(config, 5)
    resumed = run(config, resume=True)
    weights = "adapter_model.safetensors"
    assert (resumed.result / weights).read_bytes() == (whole.result / weights).read_bytes()
    assert resumed.summary.changes == whole.summary.changes
    events = read_lines(resumed.folder / "events.jsonl")
    assert [e["checkpoint"] for e in events if e["event"] == "resume"] == ["step-000004"]


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(make("train.save_steps=2", f"output_dir={tmp_path / 'whole'}"), evaluate=False)
    config = make("train.save_steps=2")
    _cut(config, 5)
    file = tmp_path / "run/checkpoints/step-000004/training_state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    resumed = run(config, evaluate=False, resume=True, watch=Watch(Console(stderr=True, width=400)))
    told = capsys.readouterr().err
    assert f"A checkpoint is refused: {file} is not what was written" in told
    assert "Going on after step 2" in told
    weights = "adapter_model.safetensors"
    assert (resumed.result / weights).read_bytes() == (whole.result / weights).read_bytes()


def test_without_a_checkpoint_a_resumed_run_begins_anew(make: Make, tmp_path: Path) -> None:
    config = make()
    _cut(config, 3)
    resumed = run(config, evaluate=False, resume=True)
    whole = run(make(f"output_dir={tmp_path / 'whole'}"), evaluate=False)
    weights = "adapter_model.safetensors"
    assert (resumed.result / weights).read_bytes() == (whole.result / weights).read_bytes()


def test_a_run_does_not_go_on_with_settings_that_lead_elsewhere(make: Make) -> None:
    _cut(make("train.save_steps=2"), 3)
    with pytest.raises(ConfigError, match="HB121") as caught:
        run(make("train.save_steps=2", "train.learning_rate=0.02", "lora.r=8"), resume=True)
    assert "`lora.r` was 4, is 8" in str(caught.value)
    assert "`train.learning_rate` was 0.01, is 0.02" in str(caught.value)
    run(make("train.save_steps=3", "train.log_steps=1", "evaluate.max_items=2"), resume=True)


def test_a_run_does_not_go_on_with_another_base(make: Make, tmp_path: Path, shared: Shared) -> None:
    base = tmp_path / "base"
    shutil.copytree(shared("models/stories260K-hf"), base)
    config = make("train.save_steps=2", f"model={base}")
    _cut(config, 3)
    (base / "generation_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="HB121.*generation_config.json"):
        run(config, resume=True)


def test_nothing_is_resumed_where_no_run_is_or_it_is_finished(make: Make) -> None:
    config = make()
    with pytest.raises(ConfigError, match="HB122.*no run"):
        run(config, resume=True)
    run(config, evaluate=False)
    with pytest.raises(ConfigError, match="HB122.*finished"):
        run(config, resume=True)
