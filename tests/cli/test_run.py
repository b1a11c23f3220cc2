"""Promises of `halfbyte run` and `halfbyte train`: summary, JSON, flags, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import Result

from halfbyte import pipeline

Call = Callable[..., Result]


def test_run_prints_before_after_cost_files_and_use(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("run", recipe)
    assert result.exit_code == 0, result.stderr
    for part in (
        "exact match",
        "held-out loss",
        "perplexity",
        "95 % intervals over 4 rows",
        "tokens/s",
        "at most for the whole process",
        "% full, 4.0 rows each",
        f"{tmp_path}/run/adapter",
        "PeftModel.from_pretrained",
        'quantization="nf4"',
    ):
        assert part in result.stdout
    assert "[big]" in result.stdout  # a row's brackets are text, not markup
    assert "measure after" in result.stderr
    assert "step 3/3 (100%)" in result.stderr


def test_json_is_the_summary_and_nothing_else(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("run", recipe, "--json")
    printed = json.loads(result.stdout)
    assert printed["result"] == str(tmp_path / "run" / "adapter")
    written = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert {key: printed[key] for key in written} == written


def test_flags_override_the_recipe(call: Call, recipe: Path, tmp_path: Path, rows: Path) -> None:
    other = tmp_path / "other rows: v2.jsonl"
    rows.rename(other)
    arguments = ("--data", other, "--method", "lora", "--output-dir", tmp_path / "elsewhere")
    result = call("train", recipe, *arguments, "--set", "train.learning_rate=1e-4")
    assert result.exit_code == 0, result.stderr
    settings = yaml.safe_load((tmp_path / "elsewhere" / "config.yaml").read_text(encoding="utf-8"))
    assert settings["method"] == "lora"
    assert settings["data"]["train"] == [str(other)]
    assert settings["train"]["learning_rate"] == 1e-4
    assert not (tmp_path / "elsewhere" / "eval").exists()
    assert "not measured" in result.stdout


def test_a_recipe_is_not_needed(call: Call, model: Path, rows: Path, tmp_path: Path) -> None:
    where = ("--model", model, "--data", rows, "--output-dir", tmp_path / "run")
    assert call("run", *where, "--dry-run").exit_code == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_and_writes_nothing(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("run", recipe, "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert (facts["train_rows"], facts["held_out_rows"], facts["steps"]) == (12, 4, 3)
    assert (facts["first_epoch"]["passes"], facts["first_epoch"]["rows_per_pass"]) == (3, 4.0)
    assert 0.5 < facts["first_epoch"]["fill"] <= 1.0
    assert facts["largest_batch"]["tokens"] > 0
    assert facts["training_seconds"] > 0
    shown = call("run", recipe, "--dry-run").stdout
    for said in ("nothing was written", "largest batch", "at that speed", "A row as the model sees it", "⟦"):
        assert said in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["run", "train"])
def test_bad_rows_are_skipped_up_to_the_number_given(call: Call, recipe: Path, rows: Path, verb: str) -> None:
    rows.write_text(rows.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    assert call(verb, recipe, "--dry-run").exit_code == 2
    result = call(verb, recipe, "--dry-run", "--json", "--skip-bad-rows", 1)
    assert json.loads(result.stdout)["skipped_rows"] == 1
    rows.write_text(rows.read_text(encoding="utf-8").replace("{broken\n", ""), encoding="utf-8")
    with_default = recipe.read_text(encoding="utf-8").replace(
        "eval_fraction", "skip_bad_rows: 1, eval_fraction"
    )
    recipe.write_text(with_default, encoding="utf-8")
    rows.write_text(rows.read_text(encoding="utf-8") + "{broken\n", encoding="utf-8")
    assert call(verb, recipe, "--dry-run", "--skip-bad-rows", 0).exit_code == 2
    shown = call(verb, recipe).stdout
    assert "1 bad rows skipped, listed in bad_rows.jsonl" in shown
    assert re.search(r"bad_rows\.jsonl +rows that were skipped, and why", shown)


def test_an_earlier_run_is_refused_and_overwritten_on_request(call: Call, recipe: Path) -> None:
    assert call("train", recipe).exit_code == 0
    for more in ((), ("--dry-run",)):
        refused = call("train", recipe, *more)
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr
    assert call("train", recipe, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--set", "train.lerning_rate=1"), "HB101"),
        (("--set", "train.epochs=-1"), "HB102"),
        (("--method", "qlorra"), "HB102"),
        (("--data", "nowhere.jsonl"), "HB201"),
        (("--model", "nowhere"), "HB"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    call: Call, recipe: Path, arguments: tuple[str, ...], code: str
) -> None:
    result = call("run", recipe, *arguments)
    assert result.exit_code == 2
    assert code in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_failed_training_exits_with_1(call: Call, recipe: Path) -> None:
    result = call("train", recipe, "--set", "train.learning_rate=1e30", "--set", "train.max_grad_norm=null")
    assert result.exit_code == 1
    assert "HB501" in result.stderr
    assert "rows.jsonl:" in result.stderr


def test_ctrl_c_before_training_exits_with_130(
    call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "prepare", interrupted)
    result = call("run", recipe)
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr


def _command(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "halfbyte", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_debug_shows_the_traceback_wherever_it_stands(recipe: Path) -> None:
    done = _command("run", recipe, "--set", "nonsense=1", "--debug")
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1
    assert "Traceback" in errors
    assert "HB101" in errors


def test_ctrl_c_exits_with_130_and_says_where_the_weights_are(
    recipe: Path, tmp_path: Path, model: Path
) -> None:
    running = _command("train", recipe, "--set", "train.max_steps=100000", "--set", "train.log_steps=1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "HB503" in errors
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert str(checkpoint) in errors.replace("\n", "")
    import halfbyte

    halfbyte.load(model, quantization="nf4", adapter=checkpoint)
