"""Promises of `halfbyte config import`: each key is taken, named, or refused, and what comes out runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.config.importing import FACTORY, Copy, call, refusal

from halfbyte.config import load_config
from halfbyte.errors import ConfigError
from halfbyte.foreign.importing import import_file
from halfbyte.foreign.tools import FOREIGN_NAMES, TOOLS
from halfbyte.settings import SETTINGS

FILES = Path(__file__).parent

# What has to be dropped of each file, and what is to come of it.
EXPECTED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "axolotl/qlora.yml": (
        (),
        {
            "method": "qlora",
            "lora.r": 32,
            "lora.alpha": 16,
            "lora.dropout": 0.05,
            "lora.target_modules": "all-linear",
            "data.format": "alpaca",
            "data.max_length": 512,
            "data.eval_fraction": 0,
            "train.packing": True,
            "train.batch_tokens": 1024,
            "train.gradient_accumulation_steps": 4,
            "train.epochs": 4,
            "train.optimizer": "paged_adamw",
            "train.schedule": "cosine",
            "train.learning_rate": 2e-4,
            "train.warmup_steps": 10,
            "train.log_steps": 1,
            "seed": 42,
        },
    ),
    "axolotl/lora_8bit.yml": (
        ("load_in_8bit",),
        {
            "method": "lora",
            "lora.modules_to_save": ["embed_tokens", "lm_head"],
            "data.eval_fraction": 0.05,
            "train.warmup_ratio": 0.1,
            "train.batch_tokens": 512,
        },
    ),
    "axolotl/instruct.yml": (
        (),
        {
            "method": "qlora",
            "data.format": "messages",
            "train.packing": False,
            "train.batch_size": 4,
            "train.optimizer": "lion",
            "train.beta2": 0.95,
            "train.min_lr_ratio": 0.1,
            "train.lora_plus_ratio": 16,
            "train.neftune_alpha": 5,
            "train.max_grad_norm": 0.5,
            "lora.target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"],
            "evaluate.max_new_tokens": 128,
            "seed": 7,
        },
    ),
    "axolotl/full.yml": (
        (),
        {
            "method": "full",
            "train.learning_rate": 2e-5,
            "train.max_steps": 20,
            "train.schedule": "constant",
            "train.warmup_steps": 2,
            "train.weight_decay": 0.1,
        },
    ),
    "llama_factory/lora_sft.yaml": (
        ("max_samples",),
        {
            "method": "lora",
            "lora.r": 8,
            "lora.alpha": 16,
            "lora.target_modules": "all-linear",
            "data.max_length": 256,
            "data.format": "alpaca",
            "train.packing": False,
            "train.batch_size": 1,
            "train.gradient_accumulation_steps": 8,
            "train.learning_rate": 1e-4,
            "train.epochs": 3,
            "train.warmup_ratio": 0.1,
            "train.save_steps": 500,
            "seed": 42,
        },
    ),
    "llama_factory/qlora_otfq.yaml": (
        (),
        {
            "method": "qlora",
            "quantization.double_quant": False,
            "lora.r": 8,
            "lora.target_modules": ["q_proj", "v_proj"],
            "data.eval_fraction": 0.1,
            "train.epochs": 3,
            "train.eval_steps": 500,
            "evaluate.batch_size": 1,
        },
    ),
    "llama_factory/lora_ds3.yaml": (
        (),
        {
            "lora.alpha": 16,
            "data.template": "chatml",
            "train.packing": True,
            "train.batch_tokens": 512,
            "train.schedule": "cosine",
            "train.min_lr_ratio": 0.1,
            "train.warmup_steps": 20,
        },
    ),
    "llama_factory/full_sft.yaml": (
        (),
        {"method": "full", "train.schedule": "linear", "train.warmup_ratio": 0, "train.learning_rate": 1e-5},
    ),
    "hugging_face/trl_sft.yaml": (
        (),
        {
            "method": "qlora",
            "quantization.double_quant": False,
            "lora.alpha": 32,
            "lora.dropout": 0.05,
            "train.batch_tokens": 512,
            "train.schedule": "constant",
            "train.warmup_ratio": 0,
        },
    ),
    "hugging_face/training_args.json": (
        (),
        {
            "method": "full",
            "train.schedule": "wsd",
            "train.decay_ratio": 0.2,
            "train.min_lr_ratio": 0.1,
            "train.warmup_ratio": 0.05,
            "train.max_grad_norm": None,
        },
    ),
}


def given_keys(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    return set(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))


def value_of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_of_another_tool_becomes_a_recipe_that_runs(copy: Copy, desk: Path, name: str) -> None:
    drop, expected = EXPECTED[name]
    done = call(
        "config", "import", copy(name), "-o", "recipe.yaml", *(x for key in drop for x in ("--drop", key))
    )
    assert done.exit_code == 0, done.stderr
    config = load_config("recipe.yaml")
    assert {setting: value_of(config, setting) for setting in expected} == expected
    assert Path(config.model) == (desk / "model").resolve()
    rehearsed = call("run", "recipe.yaml", "--dry-run", "--json")
    assert rehearsed.exit_code == 0, rehearsed.stderr
    assert json.loads(rehearsed.stdout)["train_rows"] > 0


@pytest.mark.parametrize("name", [*EXPECTED, "hugging_face/adapter_config.json"])
def test_every_key_of_a_file_is_accounted_for(copy: Copy, name: str) -> None:
    drop, _ = EXPECTED.get(name, ((), {}))
    file = copy(name)
    imported = import_file(file, drop=drop)
    taken = {key for line in imported.lines.values() for key in line.sources}
    assert taken | {*imported.idle} | {*imported.dropped} == given_keys(file)
    assert imported.dropped.keys() == set(drop)
    assert not taken & {*imported.dropped}
    text = imported.to_yaml()
    assert not [key for key in given_keys(file) if key not in text]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_recipe_written_is_the_one_imported(copy: Copy, name: str) -> None:
    imported = import_file(copy(name), drop=EXPECTED[name][0])
    assert yaml.safe_load(imported.to_yaml()) == imported.nested()
    lines = [line for line in imported.to_yaml().splitlines() if ": " in line and not line.startswith("#")]
    assert len(lines) == len(imported.lines)
    assert not [line for line in lines if not line.partition("  # ")[2]]


@pytest.mark.parametrize("name", [*EXPECTED, "hugging_face/adapter_config.json"])
def test_the_tool_is_told_by_the_keys(name: str) -> None:
    folder = {"axolotl": "axolotl", "llama_factory": "LLaMA-Factory"}
    special = {"trl_sft.yaml": "TRL", "training_args.json": "transformers", "adapter_config.json": "PEFT"}
    file = FILES / name
    imported = import_file(file, drop=EXPECTED.get(name, ((), {}))[0])
    assert imported.tool == (folder.get(file.parent.name) or special[file.name])


def test_an_adapter_gives_its_part_of_a_recipe_and_says_what_is_missing(copy: Copy, desk: Path) -> None:
    done = call("config", "import", copy("hugging_face/adapter_config.json"), "-o", "recipe.yaml")
    assert done.exit_code == 0, done.stderr
    assert "Missing: data.train" in done.stderr
    config = load_config("recipe.yaml", ["data.train=train.json"])
    assert (config.method, config.lora.r, config.lora.alpha, config.lora.dropout) == ("lora", 64, 16, 0.05)
    assert config.lora.target_modules == ["q_proj", "v_proj"]


def test_a_name_of_the_hub_is_kept_and_said_to_be_fetched(desk: Path) -> None:
    (desk / "theirs.yaml").write_text(
        "base_model: org/model\nmicro_batch_size: 1\ndatasets: [{path: org/rows, type: alpaca}]\n",
        encoding="utf-8",
    )
    imported = import_file(desk / "theirs.yaml")
    assert (imported.lines["model"].value, imported.lines["data.train"].value) == ("org/model", "org/rows")
    assert len([note for note in imported.notes if "is not here: fetch it" in note]) == 2


def test_paths_are_those_of_the_recipe_wherever_it_lies(copy: Copy, desk: Path) -> None:
    file = copy("llama_factory/full_sft.yaml")
    (desk / "recipes").mkdir()
    assert call("config", "import", file, "-o", "recipes/recipe.yaml").exit_code == 0
    assert load_config("recipes/recipe.yaml").data.train == [str(desk / "data" / "train.json")]
    assert call("config", "import", file, "-o", "recipe.yaml").exit_code == 0
    text = Path("recipe.yaml").read_text(encoding="utf-8")
    assert "train: data/train.json  #" in text
    assert "model: model  #" in text


def test_a_listed_data_set_of_other_columns_is_refused(desk: Path) -> None:
    (desk / "data").mkdir()
    listed = {
        "plain": {"file_name": "a.json"},
        "other": {"file_name": "b.json", "columns": {"prompt": "question"}},
        "talks": {"file_name": "c.json", "formatting": "sharegpt"},
        "messages": {
            "file_name": "d.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        "hub": {"hf_hub_url": "org/rows"},
    }
    (desk / "data" / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")
    file = desk / "theirs.yaml"
    error = refusal(file, FACTORY + "dataset: plain,other,talks,messages,hub\n")
    assert [name for name in listed if f"`dataset.{name}`" in error.what] == ["other", "hub"]
    for name, form in (("plain", "alpaca"), ("talks", "sharegpt"), ("messages", "messages")):
        file.write_text(FACTORY + f"dataset: {name}\n", encoding="utf-8")
        assert import_file(file).lines["data.format"].value == form


def test_an_earlier_recipe_is_kept_unless_overwriting_is_asked_for(copy: Copy) -> None:
    file = copy("axolotl/qlora.yml")
    Path("recipe.yaml").write_text("mine", encoding="utf-8")
    refused = call("config", "import", file, "-o", "recipe.yaml")
    assert (refused.exit_code, refused.stderr[:5]) == (2, "HB108")
    assert Path("recipe.yaml").read_text(encoding="utf-8") == "mine"
    assert call("config", "import", file, "-o", "recipe.yaml", "--overwrite").exit_code == 0
    assert load_config("recipe.yaml").lora.r == 32


def test_the_recipe_goes_to_stdout_and_everything_else_to_stderr(copy: Copy) -> None:
    file = copy("axolotl/qlora.yml")
    done = call("config", "import", file)
    assert yaml.safe_load(done.stdout) == import_file(file).nested()
    for said in ("Read as a file of axolotl", "wandb_project", "left empty", "Note: "):
        assert said in done.stderr
    facts = json.loads(call("config", "import", file, "--json").stdout)
    assert facts["settings"] == import_file(file).nested()
    assert facts["from"]["train.batch_tokens"] == ["micro_batch_size", "sequence_len"]


def test_the_tool_can_be_named(desk: Path) -> None:
    Path("theirs.yaml").write_text("learning_rate: 1e-3\n", encoding="utf-8")
    done = call("config", "import", "theirs.yaml", "--from", "transformers", "--json")
    assert json.loads(done.stdout)["tool"] == "transformers"
    assert call("config", "import", "theirs.yaml", "--from", "unsloth").exit_code == 2


def test_the_table_of_names_leads_to_settings() -> None:
    assert set(FOREIGN_NAMES.values()) <= set(SETTINGS)
    assert len(FOREIGN_NAMES) > 60
    assert not [name for tool in TOOLS.values() for name in tool.signature if name not in tool.keys]


ODD: tuple[object, ...] = ("word", 0.5, -1, ["a", 1], {"a": 1})


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_no_value_of_any_key_is_a_crash(desk: Path, tool: str, odd: object) -> None:
    file = desk / "theirs.json"
    codes = set()
    for key in (key for key in TOOLS[tool].keys if not key.endswith("*")):
        file.write_text(json.dumps({key: odd}), encoding="utf-8")
        try:
            imported = import_file(file, tool)
        except ConfigError as error:
            codes.add(error.code)
        else:
            assert key in imported.idle or key in {
                k for line in imported.lines.values() for k in line.sources
            }
    assert codes <= {"HB105"}
