"""Promises of learning from judged answers: what is trained, what is measured, that it resumes to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfbyte.config import load_config
from halfbyte.data.row import Message, Row
from halfbyte.errors import ConfigError, DataError
from halfbyte.pipeline import evaluate, rehearse, run
from halfbyte.settings import PREFERENCES, Config
from halfbyte.tasks.known import prepare
from halfbyte.tasks.preference import PreferenceTask, with_other_answers
from halfbyte.train.metrics import StepRecord

Make = Callable[..., Config]
ANIMALS = ("cat", "dog", "bird", "fish", "bear", "duck", "frog", "bug")
PLACES = ("park", "sea", "tree", "house")


def _pairs() -> list[dict[str, Any]]:
    """Two turns each, so that there is an earlier answer; the better ones run, the worse ones do not."""
    return [
        {
            "prompt": [
                {"role": "user", "content": f"Who is it? {place}"},
                {"role": "assistant", "content": f"A {animal}."},
                {"role": "user", "content": "What did it do?"},
            ],
            "chosen": {"role": "assistant", "content": f"The {animal} ran to the {place} and was happy."},
            "rejected": {"role": "assistant", "content": f"A {animal} did not like it."},
        }
        for animal in ANIMALS
        for place in PLACES
    ]


def _single() -> list[dict[str, Any]]:
    return [
        {
            "prompt": pair["prompt"][2]["content"] + f" {number}",
            "completion": answer["content"],
            "label": good,
        }
        for number, pair in enumerate(_pairs())
        for answer, good in ((pair["chosen"], True), (pair["rejected"], False))
    ]


@pytest.fixture
def make(tmp_path: Path, shared: Callable[[str], Path]) -> Make:
    torch.set_num_threads(1)

    def build(task: str, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Config:
        file = tmp_path / f"{task}.jsonl"
        rows = rows or (_single() if task == "kto" else _pairs())
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        base: dict[str, Any] = {
            "task": task,
            "model": str(shared("models/stories260K-hf")),
            "output_dir": str(tmp_path / "run"),
            "forecast": False,
            "dtype": "float32",
            "lora": {"r": 8},
            "data": {"train": str(file), "eval_fraction": 0.25},
            "train": {"batch_size": 4, "epochs": 6, "learning_rate": 1e-2},
            "evaluate": {"bootstrap": 200},
        }
        return load_config(None, overrides, base)

    return build


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", PREFERENCES)
def test_a_run_learns_the_judgement_and_leaves_its_evidence(make: Make, task: str) -> None:
    result = run(make(task))
    steps = _lines(result.folder / "metrics.jsonl")
    last = [step["reward_accuracy"] for step in steps[-4:]]
    assert sum(last) / len(last) > 0.9
    changes = {change.name: change for change in result.summary.changes}
    assert set(changes) == {"reward_accuracy", "reward_margin", "preference_loss"}
    assert changes["reward_accuracy"].after.value > 0.85
    assert changes["reward_margin"].verdict == "better"
    assert changes["preference_loss"].verdict == "better"
    records = _lines(result.folder / "eval/after.preferences.jsonl")
    assert len(records) == result.summary.setting.held_out_rows == (16 if task == "kto" else 8)
    assert np.mean([r["margin"] for r in records]) == pytest.approx(changes["reward_margin"].after.value)
    if task in ("dpo", "kto"):  # before training the model is its own reference and cannot tell
        assert changes["reward_accuracy"].before.value == 0.5
        assert changes["reward_margin"].before.value == 0.0


@pytest.mark.parametrize(
    ("task", "method"), [("dpo", "qlora"), ("kto", "qlora"), ("simpo", "qlora"), ("simpo", "full")]
)
def test_what_was_saved_measures_as_it_did_when_it_was_trained(make: Make, task: str, method: str) -> None:
    """An adapter is compared with the base it lies on."""
    result = run(make(task, f"method={method}", "train.epochs=1", "train.learning_rate=1e-3"))
    trained = [f"model={result.result}"] if method == "full" else []
    config = make(task, f"method={method}", *trained, "data.eval_fraction=0")
    again = evaluate(config, None if method == "full" else result.result)
    margin = next(m for m in again.metrics if m.name == "reward_margin")
    held_out = {item["id"] for item in _lines(result.folder / "eval/after.preferences.jsonl")}
    values = [score.total for score in margin.scores if score.id in held_out]
    after = next(c for c in result.summary.changes if c.name == "reward_margin").after
    assert len(values) == after.n
    assert np.mean(values) == pytest.approx(after.value, abs=1e-4)


def test_only_the_last_answer_is_learnt_and_a_pair_stands_together(make: Make) -> None:
    task = prepare(make("dpo"))
    assert isinstance(task, PreferenceTask)
    rows = task.rows.train
    assert len(rows) == 2 * task.count(rows) == 48
    for better, worse in zip(rows[::2], rows[1::2], strict=True):  # type: ignore[misc]
        assert worse.id == f"{better.id}/rejected"
        texts = [task.tokenizer.decode(e.input_ids[e.trained]) for e in (better, worse)]
        assert "ran to the" in texts[0]
        assert "did not like it" in texts[1]
        assert not any("Who is it" in text or "A cat.A" in text for text in texts)
        (begin, *_), (other, *_) = (e.trained.nonzero()[0].tolist() for e in (better, worse))
        assert better.input_ids[:begin].tolist() == worse.input_ids[:other].tolist()


def test_another_row_s_answer_does_not_depend_on_the_order_of_rows() -> None:
    rows = [
        Row((Message("user", f"q{n}"), Message("assistant", f"a{n}")), None, "r", n, label=n % 2 == 0)
        for n in range(5)
    ]
    found = {name: row.messages for name, row in with_other_answers(rows)}
    assert found == {name: row.messages for name, row in with_other_answers(rows[::-1])}
    assert len(found) == 10
    for row in rows:
        own, other = found[row.id], found[f"{row.id}/other"]
        assert own is not None and other is not None  # noqa: PT018
        assert own[0] == other[0]
        assert own[1] != other[1]


class _StopError(Exception):
    pass


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_cut_run_goes_on_to_the_same_bits(
    make: Make, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.save_steps=2", "train.max_steps=6", "lora.dropout=0.1", f"output_dir={tmp_path}/whole")
    whole = run(make(task, *settings))
    from halfbyte.train.metrics import MetricsFile

    write = MetricsFile.write

    def cut(self: MetricsFile, record: StepRecord) -> None:
        write(self, record)
        if record.step == 5:
            raise _StopError

    config = make(task, *settings[:-1], f"output_dir={tmp_path}/cut")
    monkeypatch.setattr(MetricsFile, "write", cut)
    with pytest.raises(_StopError):
        run(config)
    monkeypatch.undo()
    resumed = run(config, resume=True)
    one, other = (load_file(r.result / "adapter_model.safetensors") for r in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_cut_rows_are_counted_once_a_pair(make: Make) -> None:
    long = _pairs()
    long[3]["chosen"]["content"] += " It ran." * 400
    long[3]["rejected"]["content"] += " It ran." * 400
    task = prepare(make("dpo", "data.max_truncated=1", "data.max_length=256", rows=long))
    assert sum(task.rows.cut) == 1


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_a_row_is_skipped_whole_if_an_answer_has_nothing_to_learn(
    make: Make, tmp_path: Path, task: str
) -> None:
    """Of a pair the better answer alone is as long as can be; rows that are weighed are counted once."""
    rows = _single() if task == "kto" else _pairs()
    for at in (2, 9, 20):
        if task == "kto":
            rows[at]["prompt"] = "word " * 200
        else:
            rows[at]["prompt"][2]["content"] = "word " * 200
    settings = ("data.max_truncated=0", "data.max_length=256", "data.weights=[2]")
    with pytest.raises(DataError, match="HB208"):
        prepare(make(task, *settings, "data.skip_bad_rows=2", rows=rows))
    found = prepare(make(task, *settings, "data.skip_bad_rows=3", rows=rows))
    assert isinstance(found, PreferenceTask)
    assert sorted(fault.line or 0 for fault in found.rows.reading.skipped) == [3, 10, 21]
    assert found.count(found.rows.train) == 2 * (len(rows) - 3 - found.count(found.rows.held_out))
    lines = set()
    for side in (found.rows.train, found.rows.held_out):
        for one, other in zip(side[::2], side[1::2], strict=True):  # type: ignore[misc]
            assert other.id == f"{one.id}/{'other' if task == 'kto' else 'rejected'}"
            assert one.trained_tokens
            assert other.trained_tokens
            lines.add(int(one.where.rpartition(":")[2]))
    assert lines == set(range(1, len(rows) + 1)) - {3, 10, 21}


def test_a_rehearsal_counts_pairs(make: Make) -> None:
    found = rehearse(make("dpo"))
    plan = found.plan
    assert found.task.facts()["train_rows"] == 24
    assert plan.total_steps == len(next(iter(plan.order.windows(0)))) * 6


@pytest.mark.parametrize(("task", "wrong"), [("dpo", _single), ("kto", _pairs), ("sft", _pairs)])
def test_rows_for_another_task_are_refused(
    make: Make, task: str, wrong: Callable[[], list[dict[str, Any]]]
) -> None:
    with pytest.raises(DataError, match="HB216"):
        prepare(make(task, rows=wrong()))


@pytest.mark.parametrize(
    "setting",
    ["train.z_loss=0.1", "evaluate.exact_match=true", "preference.margin=1", "preference.good_weight=2"],
)
def test_settings_that_the_task_does_not_read_are_refused(make: Make, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"HB102[\s\S]*task dpo does not read it"):
        make("dpo", setting)


def test_constants_reach_the_objective(make: Make) -> None:
    def spec(task: str, *overrides: str) -> Any:
        found = prepare(make(task, *overrides))
        assert isinstance(found, PreferenceTask)
        return found.spec

    assert (spec("dpo").beta, spec("simpo").beta) == (0.1, 2.0)
    assert spec("simpo", "preference.beta=1", "preference.margin=0.25").margin == 0.25
    assert spec("kto", "preference.bad_weight=2").bad_weight == 2.0
