"""Promises of classification from rows to answers: what a run leaves, learns, repeats and refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli.app import app
from halfbyte.data.encoder_texts import collate_encoded
from halfbyte.errors import DataError, ModelError
from halfbyte.model.encoders import document_logits
from halfbyte.pipeline import evaluate, rehearse, run
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.tasks.classify import ClassifyTask
from halfbyte.tasks.known import prepare

Make = Callable[..., Config]
FRUIT, TOOLS = ("apple", "pear", "plum", "cherry"), ("hammer", "saw", "drill", "wrench")
WAYS = (
    "the old {}",
    "a {} on the table",
    "two {} and more",
    "my {} is here",
    "no {} today",
    "{}",
    "buy a {}",
    "red {}",
)


def rows(pairs: bool = False) -> str:
    """64 texts about fruit and tools."""
    found: list[dict[str, Any]] = []
    for label, things in (("fruit", FRUIT), ("tools", TOOLS)):
        for way in WAYS:
            for thing in things:
                row: dict[str, Any] = {"text": way.format(thing), "label": label}
                found.append(row | {"text_pair": f"is it {thing}?"} if pairs else row)
    return "\n".join(map(json.dumps, found)) + "\n"


def values(folder: Path, when: str) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: change[when]["value"] for name, change in summary["metrics"].items()}


@pytest.mark.parametrize(
    ("method", "pairs", "lr"), [("qlora", False, 2e-3), ("lora", True, 2e-3), ("full", False, 2e-4)]
)
def test_a_run_learns_and_what_it_leaves_says_the_same_alone(
    make: Make, method: str, pairs: bool, lr: float
) -> None:
    config = make("classify", rows(pairs), f"method={method}", f"train.learning_rate={lr}")
    result = run(config)
    after = values(result.folder, "after")
    assert after["accuracy"] > 0.8 > values(result.folder, "before")["accuracy"]
    assert set(after) == {"accuracy", "macro_f1", "matthews", "label_loss"}
    held_out = [
        json.loads(line) for line in (result.folder / "eval" / "after.labels.jsonl").read_text().splitlines()
    ]
    assert len(held_out) == 16
    file = Path(config.output_dir) / "held_out.jsonl"
    chosen = {row["where"].rpartition(":")[2] for row in held_out}
    lines = Path(config.data.train[0]).read_text().splitlines()
    file.write_text("\n".join(line for n, line in enumerate(lines, 1) if str(n) in chosen) + "\n")
    alone = config.model_copy(update={"data": config.data.model_copy(update={"eval": [str(file)]})})
    adapter = result.result if method != "full" else None
    if adapter is None:
        alone = alone.model_copy(update={"model": str(result.result)})
    again = {metric.name: metric.interval.value for metric in evaluate(alone, adapter).metrics}
    assert again == pytest.approx(after, abs=1e-5)


def test_packed_and_padded_runs_measure_the_same(make: Make) -> None:
    whole = make("classify", rows(), "train.epochs=1", "train.max_steps=1", "train.batch_size=48")
    packed = run(whole)
    padded = whole.model_copy(
        update={
            "train": whole.train.model_copy(update={"packing": False}),
            "output_dir": whole.output_dir + "2",
        }
    )
    assert packed.summary.training.usage.batch_tokens is not None
    found = run(padded)
    assert found.summary.training.usage.batch_tokens is None
    assert values(found.folder, "before") == values(packed.folder, "before")


def test_a_family_that_cannot_pack_is_padded_and_told_once(make: Make) -> None:
    config = make("classify", rows(), "train.max_steps=2", family="deberta-v2")
    told = io.StringIO()
    result = run(config, watch=Watch(Console(file=told, width=300)))
    assert told.getvalue().count("Rows are padded, train.batch_size in a batch, not packed: DebertaV2") == 1
    assert result.summary.training.usage.batch_tokens is None
    again = rehearse(config.model_copy(update={"output_dir": config.output_dir + "2"}))
    assert again.plan.total_steps == 2


def test_resume_gives_identical_weights(
    make: Make, resumes_to_the_same_bits: Callable[[Config], None]
) -> None:
    config = make("classify", rows(), "train.save_steps=5", "train.max_steps=12", "lora.dropout=0.1")
    resumes_to_the_same_bits(config)


def test_other_labels_are_another_run(make: Make) -> None:
    one = prepare(make("classify", rows())).rows.train.sha256
    two = prepare(make("classify", rows().replace('"label": "fruit"', '"label": "food"'))).rows.train.sha256
    assert one != two


def test_rows_that_are_cut_are_counted_and_kept(make: Make) -> None:
    config = make("classify", rows(), "data.max_length=5", "data.max_truncated=0.0")
    task = prepare(config)
    assert sum(task.rows.cut) > 10
    assert len(task.rows.train) + len(task.rows.held_out) == 64
    assert "cut at max_length" in task.described()


def test_labels_are_told_before_anything_is_trained(make: Make) -> None:
    task = rehearse(make("classify", rows())).task
    assert "labels fruit" in task.described()
    assert task.facts()["labels"] == "fruit, tools"


def test_a_held_out_label_that_is_not_trained_on_is_refused(make: Make) -> None:
    held_out = json.dumps({"text": "a new thing", "label": "frut"})
    with pytest.raises(DataError, match=r"HB232[\s\S]*eval\.jsonl:1: 'frut'"):
        prepare(make("classify", rows(), held_out=held_out))
    with pytest.raises(DataError, match="HB231"):
        prepare(make("classify", "\n".join(rows().splitlines()[:8])))


def test_an_adapter_brings_its_labels(make: Make, tmp_path: Path) -> None:
    config = make("classify", rows())
    result = run(config, evaluate=False)
    assert json.loads((result.result / "labels.json").read_text()) == {"labels": ["fruit", "tools"]}
    tools = [line for line in rows().splitlines() if "tools" in line]
    only_tools = make("classify", rows(), held_out="\n".join(tools))
    found = {m.name: m.interval.value for m in evaluate(only_tools, result.result).metrics}
    assert found["accuracy"] > 0.8  # numbered by these rows alone, tools would be the adapter's fruit
    with pytest.raises(ModelError, match="HB351"):
        evaluate(only_tools)
    unknown = make("classify", rows(), held_out=json.dumps({"text": "a dog", "label": "animals"}))
    with pytest.raises(DataError, match=r"HB232[\s\S]*'animals'"):
        evaluate(unknown, result.result)
    (result.result / "labels.json").unlink()
    with pytest.raises(ModelError, match=r"HB352[\s\S]*there is no labels.json"):
        evaluate(only_tools, result.result)


def test_another_tokenizer_than_in_training_is_refused(make: Make, tmp_path: Path) -> None:
    config = make("classify", rows(), "train.max_steps=1")
    result = run(config, evaluate=False)
    other = tmp_path / "other"
    shutil.copytree(config.model, other)
    other.chmod(0o755)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").chmod(0o644)
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    with pytest.raises(ModelError, match="HB326"):
        evaluate(config.model_copy(update={"model": str(other)}), result.result)


def test_the_python_interface_gives_a_model_with_its_labels(make: Make) -> None:
    config = make("classify", rows(), "method=lora")
    result = run(config)
    model = halfbyte.load(config.model, dtype="float32", adapter=result.result, task="classify")
    task = prepare(config)
    assert isinstance(task, ClassifyTask)
    examples = list(task.rows.held_out)
    with torch.no_grad():
        taken = document_logits(model, collate_encoded(examples, 0)).argmax(1).tolist()
    right = [
        model.config.id2label[n] == task.labels[task.numbers[e.id]]
        for n, e in zip(taken, examples, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(values(result.folder, "after")["accuracy"])


def test_the_command_line_runs_and_evaluates(make: Make, tmp_path: Path) -> None:
    config = make("classify", rows())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    runner = CliRunner()
    done = runner.invoke(app, ["run", str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    assert not runner.invoke(app, ["run", str(recipe), "--dry-run", "--overwrite"]).exit_code
    found = runner.invoke(
        app,
        [
            *("eval", config.model, config.data.train[0], "--adapter", f"{config.output_dir}/adapter"),
            *("--quantization", "nf4", "--output", str(tmp_path / "eval"), "--json"),
            *("--set", "task=classify", "--set", "dtype=float32"),
        ],
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["accuracy"]["value"] > 0.9
    assert (tmp_path / "eval" / "adapter.classes.jsonl").exists()
    checked = runner.invoke(app, ["data", "check", config.data.train[0]])
    assert "labels" in checked.output
    assert "fruit 32" in checked.output
