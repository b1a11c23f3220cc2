"""Promises of `halfbyte config import` about judged answers: objectives, constants and files of pairs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.cli.app import app
from halfbyte.config import load_config
from halfbyte.errors import ConfigError
from halfbyte.foreign.importing import import_file

AXOLOTL = "base_model: m\nmicro_batch_size: 1\n"
TRL = "model_name_or_path: m\nuse_peft: true\nlora_target_modules: all-linear\n"
FACTORY = "model_name_or_path: m\nlora_target: all\n"


def _imported(folder: Path, text: str) -> dict[str, Any]:
    file = folder / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    found = import_file(file)
    return {
        name: line.value
        for name, line in found.lines.items()
        if name == "task" or name.startswith("preference.")
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FACTORY + "stage: dpo", {"task": "dpo", "preference.beta": 0.1}),
        (
            FACTORY + "stage: dpo\npref_loss: simpo\npref_beta: 2.5\nsimpo_gamma: 1.0",
            {"task": "simpo", "preference.beta": 2.5, "preference.margin": 1.0},
        ),
        (FACTORY + "stage: dpo\npref_loss: sigmoid\npref_ftx: 0.0", {"task": "dpo", "preference.beta": 0.1}),
        (FACTORY + "stage: dpo\npref_loss: orpo", {"task": "orpo", "preference.beta": 0.1}),
        (
            FACTORY + "stage: kto\npref_beta: 0.2\nkto_chosen_weight: 1.5",
            {"task": "kto", "preference.beta": 0.2, "preference.good_weight": 1.5},
        ),
        (FACTORY + "stage: sft\npref_beta: 0.2\npref_loss: orpo", {"task": "sft"}),
        (AXOLOTL + "rl: dpo\nrl_beta: 0.3", {"task": "dpo", "preference.beta": 0.3}),
        (AXOLOTL + "rl: orpo\norpo_alpha: 0.2", {"task": "orpo", "preference.beta": 0.2}),
        (
            AXOLOTL + "rl: kto\nkto_undesirable_weight: 0.5",
            {"task": "kto", "preference.beta": 0.1, "preference.bad_weight": 0.5},
        ),
        (AXOLOTL + "simpo_gamma: 0.7", {}),
        (TRL + "loss_type: sigmoid\nbeta: 0.3", {"task": "dpo", "preference.beta": 0.3}),
        (TRL + "loss_type: [sigmoid]\nlabel_smoothing: 0.0", {"task": "dpo", "preference.beta": 0.1}),
        (TRL + "beta: 0.2\nf_divergence_type: reverse_kl", {"task": "dpo", "preference.beta": 0.2}),
        (TRL + "loss_type: kto", {"task": "kto", "preference.beta": 0.1}),
        (
            TRL + "beta: 0.2\ndesirable_weight: 1.5\nundesirable_weight: 0.5",
            {
                "task": "kto",
                "preference.beta": 0.2,
                "preference.good_weight": 1.5,
                "preference.bad_weight": 0.5,
            },
        ),
        (TRL + "loss_type: nll", {}),
    ],
)
def test_objectives_and_their_constants_are_taken(
    tmp_path: Path, text: str, expected: dict[str, object]
) -> None:
    assert _imported(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FACTORY + "stage: ppo", "`stage`"),
        (FACTORY + "stage: dpo\npref_loss: ipo", "`pref_loss`"),
        (FACTORY + "stage: dpo\npref_ftx: 0.5", "`pref_ftx`"),
        (FACTORY + "stage: dpo\nref_model: other", "`ref_model`"),
        (AXOLOTL + "rl: grpo", "`rl`"),
        (AXOLOTL + "rl: dpo\nrpo_alpha: 1.0", "`rpo_alpha`"),
        (TRL + "beta: 0.2", "`beta`: DPO's, KTO's or another's"),
        (TRL + "loss_type: ipo", "`loss_type`: 'ipo' is none of nll, sigmoid, kto"),
        (TRL + "loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.5]", "`loss_type`"),
        (TRL + "loss_type: sigmoid\nlabel_smoothing: 0.1", "`label_smoothing`"),
        (TRL + "loss_type: kto\nsync_ref_model: true", "`sync_ref_model`"),
        (TRL + "loss_type: sigmoid\ndesirable_weight: 2.0", "`task` is decided twice"),
    ],
)
def test_objectives_that_are_not_there_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _imported(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "rate", "dropout"),
    [
        ("loss_type: sigmoid", 1e-6, 0.0),
        ("loss_type: sigmoid\nlora_dropout: 0.1", 1e-6, 0.0),
        ("loss_type: kto\nlora_dropout: 0.1\ndisable_dropout: false\nlearning_rate: 1e-5", 1e-5, 0.1),
        ("loss_type: kto\ndisable_dropout: true", 1e-6, 0.0),
        ("loss_type: nll", 2e-5, 0.05),
    ],
)
def test_what_trl_does_unasked_is_done(tmp_path: Path, text: str, rate: float, dropout: float) -> None:
    """Rate and dropout are those of TRL's own classes, whose defaults are read here."""
    from trl import DPOConfig, KTOConfig, SFTConfig

    (tmp_path / "theirs.yaml").write_text(TRL + text, encoding="utf-8")
    found = import_file(tmp_path / "theirs.yaml")
    assert (found.lines["train.learning_rate"].value, found.lines["lora.dropout"].value) == (rate, dropout)
    assert any("whole conversations" in note for note in found.notes) == ("nll" in text)
    kind = SFTConfig if "nll" in text else KTOConfig if "kto" in text else DPOConfig
    defaults = {field.name: field.default for field in fields(kind)}
    if "learning_rate" not in text:
        assert defaults["learning_rate"] == rate
    assert defaults.get("beta", 0.1) == 0.1
    assert defaults.get("disable_dropout", True) is True


def _pairs() -> list[dict[str, Any]]:
    return [
        {
            "messages": [{"role": "user", "content": f"Say {n}."}],
            "chosen": {"role": "assistant", "content": f"{n}."},
            "rejected": {"role": "assistant", "content": "No."},
        }
        for n in range(12)
    ]


def test_recipes_of_pairs_run(tmp_path: Path, shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(shared("models/stories260K-hf"), target_is_directory=True)
    (tmp_path / "pairs.json").write_text(json.dumps(_pairs()), encoding="utf-8")
    talks = [
        {
            "conversations": [{"from": "human", "value": row["messages"][0]["content"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]["content"]},
            "rejected": {"from": "gpt", "value": row["rejected"]["content"]},
        }
        for row in _pairs()
    ]
    judged = [
        {"messages": [*row["messages"], row["chosen"]], "label": n % 2 == 0} for n, row in enumerate(_pairs())
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "talks.json").write_text(json.dumps(talks), encoding="utf-8")
    (tmp_path / "data" / "judged.json").write_text(json.dumps(judged), encoding="utf-8")
    columns = {"chosen": "chosen", "rejected": "rejected"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    listed = {
        "talks": {
            "file_name": "talks.json",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", **columns},
        },
        "judged": {
            "file_name": "judged.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": tags,
        },
        "odd": {"file_name": "talks.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")
    factory = "model_name_or_path: model\nlora_target: all\nlora_rank: 4\nval_size: 0.2\n"
    recipes = {
        "dpo": "base_model: model\nmicro_batch_size: 2\nadapter: lora\nlora_target_linear: true\nlora_r: 4\nrl: dpo\n"
        "datasets: [{path: pairs.json, type: chat_template.default, field_chosen: chosen}]\nval_set_size: 0.2\n",
        "simpo": factory + "stage: dpo\npref_loss: simpo\ndataset: talks\n",
        "kto": factory + "stage: kto\ndataset: judged\n",
    }
    trl = "model_name_or_path: model\nuse_peft: true\nlora_target_modules: all-linear\nlora_r: 4\n"
    theirs = [
        *recipes.items(),
        ("dpo", trl + "loss_type: sigmoid\nbeta: 0.2\ndataset_name: pairs.json\n"),
        ("kto", trl + "desirable_weight: 2.0\ndataset_name: data/judged.json\n"),
    ]
    for task, text in theirs:
        (tmp_path / "theirs.yml").write_text(text, encoding="utf-8")
        run = CliRunner().invoke(app, ["config", "import", "theirs.yml", "-o", f"{task}.yaml", "--overwrite"])
        assert run.exit_code == 0, run.stderr
        assert load_config(f"{task}.yaml").task == task
        rehearsed = CliRunner().invoke(app, ["run", f"{task}.yaml", "--dry-run", "--json"])
        assert rehearsed.exit_code == 0, rehearsed.stderr
        assert json.loads(rehearsed.stdout)["task"] == task
    with pytest.raises(ConfigError, match=r"`dataset\.odd`"):
        _imported(tmp_path, factory + "stage: dpo\ndataset: odd\n")
