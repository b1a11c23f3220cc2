"""Promises of `halfbyte config import`: each key is taken, named, or refused, and what comes out runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from halfbyte.cli.app import app
from halfbyte.config import load_config
from halfbyte.errors import ConfigError
from halfbyte.foreign.importing import import_file
from halfbyte.foreign.tools import FOREIGN_NAMES, TOOLS
from halfbyte.settings import SETTINGS

FILES = Path(__file__).parent
Copy = Callable[[str], Path]

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
            "train.optimizer": "adamw",
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


def call(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def given_keys(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    return set(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))


def value_of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


def refusal(file: Path, text: str, tool: str | None = None, *drop: str) -> ConfigError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        import_file(file, tool, drop)
    return caught.value


MEASURED = "val_set_size: 0.1\neval_steps: 50\n"
AXOLOTL = "base_model: m\nmicro_batch_size: 1\n"
FACTORY = "model_name_or_path: m\nstage: sft\nlora_target: all\n"
PEFT = "peft_type: LORA\ntarget_modules: [a]\n"
TRL = "model_name_or_path: m\nuse_peft: true\nlora_target_modules: all-linear\n"


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AXOLOTL + "load_in_8bit: true", "`load_in_8bit`: the base is held in 4 bits"),
        (AXOLOTL + "train_on_inputs: true", "`train_on_inputs`: only answers"),
        (
            AXOLOTL + "lora_rr: 8",
            "`lora_rr`: axolotl has no such key that is known here; did you mean lora_r?",
        ),
        (AXOLOTL + "rl: ipo", "`rl`: 'ipo' is none of dpo"),
        (AXOLOTL + "adapter: qlora\nload_in_4bit: true", "`lora_target_modules`: is missing"),
        (
            AXOLOTL + "adapter: llama-adapter\nlora_target_linear: true",
            "`adapter`: 'llama-adapter' is neither",
        ),
        (AXOLOTL + "adapter: lora\nlora_target_modules: '.*proj'", "'.*proj' is no list of names"),
        (AXOLOTL + "lr_scheduler: rex", "`lr_scheduler`: 'rex' is none of linear"),
        (AXOLOTL + "optimizer: adafactor", "`optimizer`: 'adafactor' runs there without scaling"),
        (AXOLOTL + "optimizer: muon", "`optimizer`: 'muon' is none of adamw"),
        (AXOLOTL + "learning_rate: fast", "`learning_rate`: 'fast' is no number"),
        (AXOLOTL + "val_set_size: 200", "`val_set_size`: 200 is a number of rows"),
        (AXOLOTL + "datasets: rows.json", "`datasets`: is no list of mappings"),
        (
            AXOLOTL + "datasets: [{path: a, type: {field_output: b}}]",
            "`datasets[0].type`: {'field_output': 'b'}",
        ),
        (AXOLOTL + "datasets: [{path: a, type: oasst}]", "`datasets[0].type`: 'oasst' is none of"),
        (AXOLOTL + "datasets: [{path: a, split: 'train[:9]'}]", "`datasets[0].split`: 'train[:9]'"),
        (AXOLOTL + "datasets: [{path: a, roles: {user: [human]}}]", "`datasets[0].roles`"),
        (AXOLOTL + "special_tokens: {eos_token: '</s>'}", "`special_tokens`: only pad_token"),
        (AXOLOTL + "load_best_model_at_end: true", "`load_best_model_at_end`: needs rows held out"),
        (AXOLOTL + "early_stopping_patience: 2\nval_set_size: 0.1", "`early_stopping_patience`: needs"),
        (FACTORY + "metric_for_best_model: accuracy", "`metric_for_best_model`: the held-out loss decides"),
        (FACTORY + "max_samples: 9", "`max_samples`: all rows"),
        (FACTORY + "finetuning_type: freeze", "`finetuning_type`: 'freeze' is neither"),
        (FACTORY + "quantization_bit: 8", "`quantization_bit`: 8"),
        (
            FACTORY + "per_device_train_batch_size: 1.5",
            "`per_device_train_batch_size`: 1.5 is no whole number",
        ),
        (FACTORY + "oft_rank: 4", "`oft_rank`: this kind of adapter"),
        (AXOLOTL + "peft_init_lora_weights: olora", "`peft_init_lora_weights`: 'olora' is none of"),
        (FACTORY + "lr_scheduler_type: warmup_stable_decay", "`lr_scheduler_kwargs`: a decay in steps needs"),
        (FACTORY + "lr_scheduler_kwargs: {num_cycles: 2}", "`lr_scheduler_kwargs`: num_cycles: no argument"),
        (
            FACTORY + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: a}",
            "is no number",
        ),
        (FACTORY + "eval_steps: often", "`eval_steps`: 'often' is no number"),
        (
            AXOLOTL + MEASURED + "early_stopping_patience: few",
            "`early_stopping_patience`: 'few' is no number",
        ),
        (AXOLOTL + "warmup_steps: 10.5", "`warmup_steps`: 10.5 is no whole number"),
        (FACTORY + "warmup_ratio: some", "`warmup_ratio`: 'some' is no number"),
        (TRL + "assistant_only_loss: false", "`assistant_only_loss`: only answers"),
        (TRL + "bnb_4bit_compute_dtype: int8", "`bnb_4bit_compute_dtype`: 'int8' is none of"),
        ("peft_type: IA3\ntarget_modules: [a]", "`peft_type`: LoRA is the one kind"),
        ("peft_type: LORA\ntarget_modules: [a]\nlora_bias: true", "`lora_bias`: this kind of adapter"),
    ],
)
def test_what_changes_the_result_is_refused_by_name(desk: Path, text: str, said: str) -> None:
    error = refusal(desk / "theirs.yaml", text)
    assert error.code == "HB105"
    assert said in error.what
    assert "--drop " in error.fix


def test_all_that_is_refused_is_named_at_once_and_can_be_dropped(desk: Path) -> None:
    file = desk / "theirs.yaml"
    text = AXOLOTL + "load_in_8bit: true\noptimizer: muon\ndatasets: [{path: a, type: b, split: c}]\n"
    error = refusal(file, text)
    assert "4 key(s)" in error.what
    names = [word for word in error.fix.split() if word not in {"--drop"} and f"`{word}`" in error.what]
    imported = import_file(file, drop=names)
    assert len(names) == 4
    assert {*imported.dropped} == set(names)
    assert all(name in imported.to_yaml().partition("# Dropped, as asked for:")[2] for name in names)
    assert "train.optimizer" not in imported.lines


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("seed: 1\n", "HB104", "no key tells"),
        (
            AXOLOTL + "stage: sft\n",
            "HB104",
            "2 tools: axolotl has base_model, micro_batch_size; llama-factory",
        ),
        (TRL + "max_length: 256\nmax_seq_length: 512\n", "HB106", "`data.max_length` is decided twice"),
        ("base_model: [\n", "HB103", "not YAML"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused(desk: Path, text: str, code: str, said: str) -> None:
    error = refusal(desk / "theirs.yaml", text)
    assert error.code == code
    assert said in error.what


@pytest.mark.parametrize("text", ["{", "[]"])
def test_json_that_is_no_mapping_is_refused(desk: Path, text: str) -> None:
    assert refusal(desk / "theirs.json", text).code == "HB103"


def test_only_what_is_refused_can_be_dropped(desk: Path) -> None:
    text = AXOLOTL + "load_in_8bit: true\n"
    error = refusal(desk / "theirs.yaml", text, None, "load_in_8bits")
    assert (error.code, error.fix) == ("HB107", "did you mean load_in_8bit?")
    assert refusal(desk / "theirs.yaml", text, None, "base_model").code == "HB107"


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXOLOTL + "adapter: lora\nlora_target_linear: true\npeft_use_dora: true", {"lora.dora": True}),
        (
            FACTORY + "use_rslora: true\npissa_init: true",
            {"lora.rank_stabilised": True, "lora.init": "pissa"},
        ),
        (
            FACTORY + "pissa_init: false\nadditional_target: embed_tokens,lm_head",
            {"lora.modules_to_save": ["embed_tokens", "lm_head"]},
        ),
        (TRL + "use_dora: true\nlora_modules_to_save: []", {"lora.dora": True}),
        (
            PEFT + "init_lora_weights: pissa_niter_16\nrank_pattern: {b: 4}\nalpha_pattern: {}",
            {"lora.init": "pissa", "lora.rank_pattern": {"b": 4}},
        ),
    ],
)
def test_variants_of_lora_are_taken(desk: Path, text: str, expected: dict[str, object]) -> None:
    (desk / "theirs.yaml").write_text(text, encoding="utf-8")
    imported = import_file(desk / "theirs.yaml")
    names = ("dora", "rank_stabilised", "init", "modules_to_save", "rank_pattern", "alpha_pattern")
    lines = {
        f"lora.{name}": imported.lines[f"lora.{name}"].value
        for name in names
        if f"lora.{name}" in imported.lines
    }
    assert {name: value for name, value in lines.items() if value is not False} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXOLOTL + MEASURED, {"train.eval_steps": 50}),
        (AXOLOTL + "eval_steps: 50", {}),
        (AXOLOTL + "val_set_size: 0.1\neval_steps: 0.05", {}),
        (
            AXOLOTL + MEASURED + "load_best_model_at_end: true\nearly_stopping_patience: 3",
            {"train.eval_steps": 50, "train.keep": "best", "train.early_stopping_patience": 3},
        ),
        (FACTORY + "val_size: 0.1\neval_steps: 50", {}),
        (FACTORY + "val_size: 0.1\neval_strategy: steps\neval_steps: 50", {"train.eval_steps": 50}),
        (FACTORY + "val_size: 0.1\neval_strategy: steps\nlogging_steps: 20", {"train.eval_steps": 20}),
        (FACTORY + "val_size: 0.1\neval_strategy: epoch", {}),
        (TRL + "dataset_name: a\nvalidation_file: b\neval_strategy: steps", {"train.eval_steps": 500}),
    ],
)
def test_measuring_while_training_is_taken_where_something_is_held_out(
    desk: Path, text: str, expected: dict[str, object]
) -> None:
    (desk / "theirs.yaml").write_text(text, encoding="utf-8")
    lines = import_file(desk / "theirs.yaml").lines
    names = ("train.eval_steps", "train.keep", "train.early_stopping_patience")
    assert {name: lines[name].value for name in names if name in lines} == expected


def test_lion_of_transformers_keeps_its_betas(desk: Path) -> None:
    file = desk / "theirs.yaml"
    file.write_text(AXOLOTL + "optimizer: lion_8bit\nadam_epsilon: 1e-6\n", encoding="utf-8")
    imported = import_file(file)
    assert imported.lines["train.beta2"].value == 0.999
    assert imported.idle["adam_epsilon"] == "lion does not read it"
    assert any("8 bits" in note for note in imported.notes)


def test_settings_that_the_method_does_not_read_are_named_not_written(desk: Path) -> None:
    file = desk / "theirs.yaml"
    file.write_text(
        FACTORY + "finetuning_type: full\nlora_rank: 4\nloraplus_lr_ratio: 2\ndouble_quantization: true\n"
    )
    imported = import_file(file)
    assert not [name for name in imported.lines if name.startswith(("lora.", "quantization."))]
    assert {"lora_rank", "loraplus_lr_ratio", "double_quantization", "lora_target"} <= imported.idle.keys()
    assert "train.lora_plus_ratio" not in imported.lines


def test_values_that_no_recipe_may_have_are_refused_before_one_is_written(desk: Path) -> None:
    Path("theirs.yaml").write_text(AXOLOTL + "learning_rate: -1\ndatasets: [{path: a}]\n", encoding="utf-8")
    done = call("config", "import", "theirs.yaml", "-o", "recipe.yaml")
    assert done.exit_code == 2
    assert "HB102" in done.stderr
    assert "`train.learning_rate` got -1" in done.stderr
    assert not Path("recipe.yaml").exists()


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
