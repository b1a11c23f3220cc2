"""Planted faults in settings: each one stops the run before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfbyte.cli.app import app

RECIPE = "model: model\noutput_dir: run\ndata: {train: rows.jsonl}\n"


@pytest.mark.parametrize(
    ("planted", "code", "said"),
    [
        ("train: {lerning_rate: 1e-3}", "HB101", "did you mean `train.learning_rate`?"),
        ("lora: {rank: 8}", "HB101", "did you mean `lora.r`?"),
        ("per_device_train_batch_size: 4", "HB101", "did you mean `train.batch_size`?"),
        ("Train: {epochs: 1}", "HB101", "did you mean `train`?"),
        ("train: {decay_ratio: 0.2}", "HB102", "train.schedule cosine does not read it"),
        ("train: {optimizer: sgd, beta1: 0.9}", "HB102", "train.optimizer sgd does not read it"),
        ("train: {packing: false, batch_tokens: 512}", "HB102", "null where train.packing is false"),
        ("method: full\ntrain: {lora_plus_ratio: 16}", "HB102", "method full trains no adapter"),
    ],
)
def test_hostile_16_a_misspelt_or_unread_setting_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str, code: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE + planted + "\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["run", "recipe.yaml"])
    assert done.exit_code == 2
    assert code in done.stderr
    assert said in done.stderr
    assert not Path("run").exists()


def test_hostile_16_a_key_of_another_tool_that_nothing_reads_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = "base_model: model\nmicro_batch_size: 2\nlora_dropuot: 0.1\n"
    Path("theirs.yml").write_text(theirs, encoding="utf-8")
    done = CliRunner().invoke(app, ["config", "import", "theirs.yml", "-o", "recipe.yaml"])
    assert done.exit_code == 2
    assert "HB105" in done.stderr
    assert "`lora_dropuot`" in done.stderr
    assert "did you mean lora_dropout?" in done.stderr
    assert not Path("recipe.yaml").exists()
