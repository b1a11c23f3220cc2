"""Promises of fine-tuning encoder-decoders, from rows to answers: what a run leaves, repeats, refuses."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.model.seq2seq_families import t5, tokenizer, write
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

import halfbyte
from halfbyte.cli.app import app
from halfbyte.config import load_config
from halfbyte.errors import DataError, EvaluateError, ModelError
from halfbyte.model.loading import load
from halfbyte.pipeline import evaluate, rehearse, run
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare

Make = Callable[..., Config]
THINGS = {"plum": "fruit", "pear": "fruit", "saw": "tool", "drill": "tool"}
WAYS = (
    "a {}",
    "the old {}",
    "two {}",
    "my {} is here",
    "no {} now",
    "{}",
    "buy a {}",
    "red {}",
    "is it a {}?",
)


def rows() -> str:
    """36 short prompts with one of two answers."""
    found = [
        {"prompt": way.format(thing), "completion": kind} for way in WAYS for thing, kind in THINGS.items()
    ]
    return "".join(json.dumps(row) + "\n" for row in found)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Builds the settings of a run that takes a few seconds."""
    torch.set_num_threads(1)

    def build(*overrides: str, kind: str = "t5", train: str = "") -> Config:
        if not (tmp_path / kind).exists():
            write(tmp_path / kind, kind)
        (tmp_path / "train.jsonl").write_text(train or rows(), encoding="utf-8")
        base: dict[str, Any] = {
            "model": str(tmp_path / kind),
            "output_dir": str(tmp_path / "run"),
            "forecast": False,
            "dtype": "float32",
            "lora": {"r": 8, "alpha": 16},
            "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32, "eval_fraction": 0.25},
            "train": {"batch_size": 9, "epochs": 25, "learning_rate": 1e-2},
            "evaluate": {"bootstrap": 200},
        }
        return load_config(None, overrides, base)

    return build


def values(folder: Path, when: str) -> dict[str, float]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: change[when]["value"] for name, change in summary["metrics"].items()}


@pytest.mark.parametrize(
    ("method", "kind", "lr"),
    [("qlora", "t5", 1e-2), ("lora", "flan", 1e-2), ("full", "t5", 1e-2), ("qlora", "bart", 1e-2)],
)
def test_a_run_learns_and_what_it_leaves_says_the_same_alone(
    make: Make, method: str, kind: str, lr: float
) -> None:
    config = make(f"method={method}", f"train.learning_rate={lr}", kind=kind)
    result = run(config)
    before, after = values(result.folder, "before"), values(result.folder, "after")
    assert after["exact_match"] >= 0.9 > before["exact_match"]
    assert after["loss"] < before["loss"] / 4
    assert after["perplexity"] == pytest.approx(math.exp(after["loss"]))
    assert result.summary.samples
    held_out = [
        json.loads(line) for line in (result.folder / "eval" / "after.loss.jsonl").read_text().splitlines()
    ]
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


def test_the_loss_measured_is_that_of_transformers(make: Make) -> None:
    """Written out once more with nothing of ours: rows alone, labels as its tokenizer makes them."""
    config = make("method=lora")
    measured = prepare(config, held_out_only=True)
    found = {m.name: m.interval.value for m in measured.measure(measured.load()).metrics}
    model = AutoModelForSeq2SeqLM.from_pretrained(config.model, dtype=torch.float32).eval()
    own = AutoTokenizer.from_pretrained(config.model)
    total = count = 0.0
    for line in rows().splitlines():
        row = json.loads(line)
        labels = own(text_target=row["completion"], return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(**own(row["prompt"], return_tensors="pt"), labels=labels).loss
        total, count = total + float(loss) * labels.numel(), count + labels.numel()
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)


def test_answers_are_those_that_transformers_generates(make: Make) -> None:
    result = run(make("method=full", "train.learning_rate=1e-2"))
    model = AutoModelForSeq2SeqLM.from_pretrained(result.result, dtype=torch.float32).eval()
    own = AutoTokenizer.from_pretrained(result.result)
    answers = [
        json.loads(line) for line in (result.folder / "eval" / "after.answers.jsonl").read_text().splitlines()
    ]
    assert len(answers) > 5
    for answer in answers:
        inputs = own(answer["prompt"].removesuffix("</s>"), return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)[0]
        assert own.decode(written, skip_special_tokens=True).strip() == answer["got"].strip()
        assert answer["stopped"]


def test_an_answer_longer_than_the_decoder_s_positions_is_refused(make: Make) -> None:
    found = prepare(make("evaluate.max_new_tokens=64", kind="bart"), held_out_only=True)
    assert found.measure(found.load()).answers  # prompt and answer together are longer than the 64 positions
    short = prepare(make("evaluate.max_new_tokens=65", kind="bart"), held_out_only=True)
    with pytest.raises(EvaluateError) as caught:
        short.measure(short.load())
    assert caught.value.code == "HB603"


def test_rows_are_padded_and_that_is_told_once(make: Make) -> None:
    told = io.StringIO()
    config = make("train.max_steps=2")
    result = run(config, watch=Watch(Console(file=told, width=300)))
    assert told.getvalue().count("Rows are padded, train.batch_size in a batch, not packed") == 1
    assert "T5Block are not fused" in told.getvalue()
    assert result.summary.training.usage.batch_tokens is None
    again = rehearse(config.model_copy(update={"output_dir": config.output_dir + "2"}))
    assert again.plan.total_steps == 2
    assert again.task.facts()["prompt_tokens"]


def test_resume_gives_identical_weights(
    make: Make, resumes_to_the_same_bits: Callable[[Config], None]
) -> None:
    config = make("train.save_steps=5", "train.max_steps=12", "lora.dropout=0.1")
    resumes_to_the_same_bits(config)


def test_what_the_tokenizer_changes_is_told(make: Make) -> None:
    row = json.dumps({"prompt": "an {odd} one", "completion": "line\nend"}) + "\n"
    notes = " ".join(prepare(make(train=rows() + row)).notes())
    assert "In 1 prompts" in notes
    assert "1 answers do not come back" in notes


def test_rows_that_are_cut_are_counted(make: Make) -> None:
    task = prepare(make("data.max_length=8", "data.max_truncated=1.0"))
    assert sum(task.rows.cut) > 5
    assert "cut at max_length" in task.described()
    with pytest.raises(DataError) as caught:
        prepare(make("data.max_length=8"))
    assert caught.value.code == "HB221"


@pytest.mark.parametrize(
    ("overrides", "code"), [(("task=dpo",), "HB354"), (("train.neftune_alpha=5",), "HB357")]
)
def test_what_such_a_model_cannot_do_is_refused(make: Make, overrides: tuple[str, ...], code: str) -> None:
    with pytest.raises(ModelError) as caught:
        prepare(make(*overrides))
    assert caught.value.code == code
    assert caught.value.fix


def test_a_model_that_ends_answers_otherwise_is_refused_before_training(make: Make, tmp_path: Path) -> None:
    config = make()
    t5(eos_token_id=3).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError) as caught:
        run(config)
    assert caught.value.code == "HB356"


def test_the_python_interface_loads_what_was_trained(make: Make) -> None:
    config = make("quantization.scales=absmax", "train.max_steps=10")
    result = run(config)
    ids = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    tuned = halfbyte.load(config.model, quantization="nf4", dtype="float32", adapter=result.result)
    base = halfbyte.load(config.model, quantization="nf4", dtype="float32")
    assert not torch.allclose(tuned(**ids).logits, base(**ids).logits, atol=1e-3)
    other = tokenizer()
    other.add_tokens(["new"])
    other.save_pretrained(config.model)
    with pytest.raises(ModelError) as caught:
        halfbyte.load(config.model, quantization="nf4", dtype="float32", adapter=result.result)
    assert caught.value.code == "HB326"


def test_the_command_line_runs_evaluates_and_shows_both_sides(make: Make, tmp_path: Path) -> None:
    config = make()
    recipe, rows_file = tmp_path / "recipe.yaml", config.data.train[0]
    recipe.write_text(config.to_yaml())
    runner = CliRunner()
    done = runner.invoke(app, ["run", str(recipe)])
    assert done.exit_code == 0, done.output
    assert "AutoModelForSeq2SeqLM" in done.output
    assert not runner.invoke(app, ["run", str(recipe), "--dry-run", "--overwrite"]).exit_code
    found = runner.invoke(
        app,
        [
            *("eval", config.model, rows_file, "--adapter", f"{config.output_dir}/adapter"),
            *("--quantization", "nf4", "--output", str(tmp_path / "eval"), "--json"),
            *("--set", "dtype=float32", "--set", "evaluate.max_new_tokens=8"),
        ],
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["exact_match"]["value"] > 0.9
    shown = runner.invoke(app, ["data", "show", rows_file, "--model", config.model, "-n", "1", "--tokens"])
    assert "template none, 36 rows" in shown.output
    assert "a plum</s>\n" in shown.output
    assert "⟦fruit</s>⟧\n" in shown.output
    assert "8 tokens" not in shown.output
    counted = runner.invoke(app, ["data", "check", rows_file, "--model", config.model])
    assert counted.exit_code == 0, counted.output
    assert "tokens" in counted.output


def test_a_quantized_folder_is_tuned_as_the_whole_one(make: Make, tmp_path: Path) -> None:
    config = make()
    done = CliRunner().invoke(app, ["quantize", config.model, str(tmp_path / "small")])
    assert done.exit_code == 0, done.output
    ids = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    small = load(tmp_path / "small", quantization=None, dtype=torch.float32)
    whole = halfbyte.load(config.model, quantization="nf4", scales="mse", dtype="float32")
    one = halfbyte.load(config.model, quantization="nf4", dtype="float32")
    found = small(**ids).logits
    assert any(torch.equal(found, model(**ids).logits) for model in (whole, one))
