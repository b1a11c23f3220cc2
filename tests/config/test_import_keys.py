"""Promises of `halfbyte config import` about single keys: taken as they are meant, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.config.importing import AXOLOTL, FACTORY, MEASURED, PEFT, TRL, call, refusal

from halfbyte.foreign.importing import import_file


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AXOLOTL + "gradient_checkpointing: offload_disk", "disk"),
        (AXOLOTL + "gradient_checkpointing: true\nactivation_offloading: disk", "disk"),
        (AXOLOTL + "gradient_checkpointing: offload_disk\nactivation_offloading: disk", "disk"),
        (AXOLOTL + "gradient_checkpointing: offload\nactivation_offloading: legacy", None),
        (AXOLOTL + "gradient_checkpointing: true\nactivation_offloading: true", None),
        (FACTORY + "use_unsloth_gc: true\ndisable_gradient_checkpointing: false", None),
        (TRL + "activation_offloading: true\ngradient_checkpointing_kwargs: {offload: true}", None),
    ],
)
def test_what_waits_on_disk_there_may_do_so_here(desk: Path, text: str, expected: str | None) -> None:
    (desk / "theirs.yaml").write_text(text, encoding="utf-8")
    imported = import_file(desk / "theirs.yaml")
    line = imported.lines.get("train.activations")
    assert (line.value if line else None) == expected
    asked = {key for key in imported.idle if "gradient_checkpointing" in key or "offloading" in key}
    assert asked or expected


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch_fused", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("paged_adamw", "paged_adamw"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
    ],
)
def test_adamw_in_8_bits_or_paged_is_what_it_is_there(desk: Path, theirs: str, ours: str) -> None:
    file = desk / "theirs.yaml"
    file.write_text(AXOLOTL + f"optimizer: {theirs}\nadam_beta2: 0.95\n", encoding="utf-8")
    imported = import_file(file)
    assert imported.lines["train.optimizer"].value == ours
    assert imported.lines["train.beta2"].value == 0.95
    assert not any("8 bits" in note for note in imported.notes)


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
