"""Promises of a run whose layers keep in 8 bits or on disk: the same bits, or a told distance from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.short_runs import VARIED, Make, Shared, read_lines, settings_in
from tests.test_pipeline_resume import _cut

from halfbyte.errors import ConfigError
from halfbyte.model import blocks, packed
from halfbyte.model.speeds import Speeds
from halfbyte.pipeline import RunResult, rehearse, run
from halfbyte.report.watch import Watch
from halfbyte.tasks import keeping

WEIGHTS = "adapter_model.safetensors"
TIGHT = "train.activation_memory_gb=0.0004"  # of about 0.0007 GB that the layers' all would take
HARD = ("train.gradient_accumulation_steps=2", "lora.dropout=0.2", TIGHT)


@pytest.fixture
def make(tmp_path: Path, shared: Shared, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds the settings of a run that takes about a second, on a machine with a quick disk."""
    monkeypatch.setattr(blocks, "measure_speeds", lambda *_: Speeds(1.0, 1e12, 1e12))
    return settings_in(tmp_path, shared)


def event(result: RunResult, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in read_lines(result.folder / "events.jsonl") if e["event"] == name)
    return found


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_on_disk_ends_in_the_same_adapter_and_leaves_nothing_else(
    make: Make, tmp_path: Path, packing: str
) -> None:
    same = (*HARD, f"train.packing={packing}", "train.activation_memory_gb=0.0005")
    exact = run(make(f"output_dir={tmp_path / 'exact'}", *same), evaluate=False)
    disk = run(make("train.activations=disk", *same), evaluate=False)
    assert (disk.result / WEIGHTS).read_bytes() == (exact.result / WEIGHTS).read_bytes()
    keeps, before = event(disk, "memory")["keeps"], event(exact, "memory")["keeps"]
    assert "input" in before
    assert "disk" in keeps
    assert "input" not in keeps
    left = [{p.name for p in each.folder.rglob("*")} for each in (disk, exact)]
    assert left[0] == left[1]


def test_a_run_in_8_bits_says_how_far_its_gradient_is_off(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make("train.activations=8bit", *HARD)
    said = Watch(Console(stderr=True, width=400))
    assert "layers in 8 bits: off by" in str(rehearse(config, watch=said).trial.deviation.described())  # type: ignore[union-attr]
    assert not Path(config.output_dir).exists()
    result = run(config, evaluate=False, watch=said)
    assert "eight_bit" in event(result, "memory")["keeps"]
    found = event(result, "gradient_deviation")
    assert 0 < found["relative"] < 0.05
    assert 1 - found["relative"] ** 2 < found["cosine"] < 1
    assert found["worst_relative"] >= found["relative"]
    assert found["worst"].endswith(("lora_A", "lora_B"))
    assert found["layers"] == event(result, "memory")["keeps"].count("eight_bit")
    assert not found["is_much"]
    told = capsys.readouterr().err
    assert "keep products in 8 bits" in told
    assert f"off by {found['relative']:.2%}, cosine {found['cosine']:.6f}" in told
    assert "exact is safer" not in told


def test_a_wrong_scale_is_warned_of(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = packed.dequantise
    monkeypatch.setattr(packed, "dequantise", lambda c, s, dtype: right(c, s * 1.1, dtype))
    said = Watch(Console(stderr=True, width=400))
    result = run(make("train.activations=8bit", *HARD), evaluate=False, watch=said)
    assert event(result, "gradient_deviation")["relative"] > 0.05
    assert event(result, "gradient_deviation")["is_much"]
    assert "more than 5%: train.activations: exact is safer" in capsys.readouterr().err


def test_a_cut_run_in_8_bits_goes_on_to_the_same_adapter_with_other_free_memory(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = ("train.activations=8bit", "train.save_steps=2", "lora.dropout=0.2")
    monkeypatch.setattr(keeping, "activation_budget_bytes", lambda *_: 400_000)
    whole = run(make(f"output_dir={tmp_path / 'whole'}", *same), evaluate=False)
    assert "eight_bit" in event(whole, "memory")["keeps"]
    config = make(*same)
    _cut(config, 5)
    monkeypatch.setattr(keeping, "activation_budget_bytes", lambda *_: 10**9)
    resumed = run(config, evaluate=False, resume=True)
    assert (resumed.result / WEIGHTS).read_bytes() == (whole.result / WEIGHTS).read_bytes()
    other = run(make(f"output_dir={tmp_path / 'other'}", *same), evaluate=False)
    assert (other.result / WEIGHTS).read_bytes() != (whole.result / WEIGHTS).read_bytes()


def test_a_run_on_disk_may_go_on_without_one_but_8_bits_stay(make: Make, tmp_path: Path) -> None:
    whole = run(make(f"output_dir={tmp_path / 'whole'}", TIGHT), evaluate=False)
    _cut(make("train.activations=disk", "train.save_steps=2", TIGHT), 3)
    with pytest.raises(ConfigError, match=r"HB121[\s\S]*`train.activations` was 'exact', is '8bit'"):
        run(make("train.activations=8bit", "train.save_steps=2", TIGHT), resume=True)
    resumed = run(make("train.save_steps=2", TIGHT), evaluate=False, resume=True)
    assert (resumed.result / WEIGHTS).read_bytes() == (whole.result / WEIGHTS).read_bytes()


def test_layers_that_are_not_fused_are_named(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    said = Watch(Console(stderr=True, width=400))
    result = run(make("train.activations=8bit", *VARIED), evaluate=False, watch=said)
    told = capsys.readouterr().err
    assert "are not fused: DoRA rescales its projections" in told
    assert "train.activations: 8bit is for fused layers alone" in told
    events = [e["event"] for e in read_lines(result.folder / "events.jsonl")]
    assert "gradient_deviation" not in events
    assert "memory" not in events
