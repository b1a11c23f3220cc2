"""Settings: defaults, merging, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from halfbyte.config import load_config
from halfbyte.errors import ConfigError, nearest_name
from halfbyte.foreign.tools import FOREIGN_NAMES
from halfbyte.settings import SECTIONS, SETTINGS, Config

LEAST = "model: m\ndata: {train: rows.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def fault(folder: Path, text: str, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return caught.value


def test_model_and_data_are_all_a_recipe_needs(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LEAST))
    assert (config.method, config.quantization.format, config.lora.r, config.train.learning_rate) == (
        "qlora",
        "nf4",
        16,
        2e-4,
    )


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001", "+1e-4", "1.0e-4"])
def test_every_spelling_of_a_number_is_a_number(tmp_path: Path, number: str) -> None:
    file = write(tmp_path, LEAST + f"train: {{learning_rate: {number}}}")
    assert load_config(file).train.learning_rate == 1e-4
    assert load_config(write(tmp_path, LEAST), [f"train.learning_rate={number}"]).train.learning_rate == 1e-4


def test_overrides_beat_the_file_and_the_file_beats_the_base(tmp_path: Path) -> None:
    base = {"seed": 1, "lora": {"r": 4, "alpha": 4}, "train": {"batch_size": 2}}
    file = write(tmp_path, LEAST + "seed: 2\nlora: {r: 8}\n")
    config = load_config(file, ["lora.r=32", "evaluate.exact_match=false"], base)
    assert (config.seed, config.lora.r, config.lora.alpha, config.train.batch_size) == (2, 32, 4, 2)
    assert config.evaluate.exact_match is False


def test_an_override_may_name_a_list_or_null(tmp_path: Path) -> None:
    file = write(tmp_path, LEAST)
    config = load_config(file, ["lora.target_modules=[q_proj, v_proj]", "train.max_grad_norm=null"])
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.train.max_grad_norm is None


def test_model_and_data_paths_of_a_file_are_relative_to_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(
        write(tmp_path, "model: m\ndata: {train: [a.jsonl, b/c.jsonl]}"), ["data.eval=d.jsonl"]
    )
    assert config.model == str(tmp_path / "m")
    assert config.data.train == [str(tmp_path / "a.jsonl"), str(tmp_path / "b" / "c.jsonl")]
    assert config.data.eval == [str(tmp_path / "elsewhere" / "d.jsonl")]


def test_without_a_file_the_base_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None, base={"model": "m", "data": {"train": "a.jsonl"}})
    assert config.data.train == [str(tmp_path / "a.jsonl")]


def test_written_settings_read_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LEAST), ["train.eps=1e-12", "seed=7", "data.eval=é.jsonl"])
    other = tmp_path / "other"
    other.mkdir()
    assert load_config(write(other, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lora: {rnak: 8}", "lora.r"),
        ("train: {learning_rat: 1}", "train.learning_rate"),
        ("learning_rate: 1", "train.learning_rate"),
        ("lora_alpha: 1", "lora.alpha"),
        ("train: {per_device_train_batch_size: 1}", "train.batch_size"),
        ("train: {max_length: 64}", "data.max_length"),
        ("methud: lora", "method"),
        ("batch_size: 1", "train.batch_size"),
        ("sample_packing: true", "train.packing"),
        ("packing: true", "train.packing"),
        ("quantisation: {format: nf4}", "quantization"),
        ("model_name_or_path: x", "model"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_meant(tmp_path: Path, written: str, meant: str) -> None:
    error = fault(tmp_path, LEAST + written)
    assert error.code == "HB101"
    assert f"did you mean `{meant}`?" in str(error)
    assert "line 3" in str(error)


def test_an_unknown_setting_like_no_other_lists_what_is_known(tmp_path: Path) -> None:
    assert "known here: epochs, max_steps, packing, batch_size" in str(
        fault(tmp_path, LEAST + "train: {zzqx: 1}")
    )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("method: qlor", "`method` got 'qlor', expected 'full', 'lora' or 'qlora'"),
        ("train: {batch_size: 0}", "`train.batch_size` got 0, expected greater than or equal to 1"),
        ("train: {batch_size: '8'}", "`train.batch_size` got '8', expected a valid integer"),
        ("train: {batch_size: true}", "`train.batch_size` got True, expected a valid integer"),
        ("train: {learning_rate: .nan}", "`train.learning_rate` got nan, expected a finite number"),
        ("train: {learning_rate: .inf}", "`train.learning_rate` got inf, expected a finite number"),
        ("train: {batch_tokens: 1}", "`train.batch_tokens` got 1, expected greater than or equal to 2"),
        (
            "train: {packing: false, batch_tokens: 4096}",
            "`train.batch_tokens` got 4096, expected null where train.packing is false: set train.batch_size",
        ),
        (
            "train: {batch_tokens: 511}",
            "`train.batch_tokens` got 511, expected at least the 512 of data.max_length: raise it, or lower",
        ),
        ("train: {beta2: 1}", "`train.beta2` got 1, expected less than 1"),
        ("seed: -1", "`seed` got -1"),
        ("seed: 4294967296", "`seed` got 4294967296"),
        ("lora:", "`lora` got None, expected a mapping of settings"),
        ("lora: 8", "`lora` got 8, expected a mapping of settings"),
        ("lora: {target_modules: []}", "`lora.target_modules` got []"),
        ("quantization: {blocksize: 48}", "`quantization.blocksize` got 48"),
        ("evaluate: {exact_match: 3}", "`evaluate.exact_match` got 3, expected 'auto' or a valid boolean"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_got_and_expected(
    tmp_path: Path, written: str, said: str
) -> None:
    error = fault(tmp_path, LEAST + written)
    assert error.code == "HB102"
    assert said in str(error)


def test_a_pass_may_hold_just_the_longest_row(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: rows.jsonl, max_length: 64}\n"
    assert load_config(write(tmp_path, text + "train: {batch_tokens: 64}")).train.batch_tokens == 64
    said = str(fault(tmp_path, text + "train: {batch_tokens: 63}"))
    assert "line 3: `train.batch_tokens` got 63, expected at least the 64 of data.max_length" in said


def test_faults_between_sections_are_told_with_all_others(tmp_path: Path) -> None:
    said = str(fault(tmp_path, LEAST + "seed: -1\nlora: {r: 0}\ntrain: {batch_tokens: 3}", "train.eps=["))
    assert "4 fault(s)" in said
    for part in ("`seed`", "`lora.r`", "`train.batch_tokens`", "train.eps=["):
        assert part in said


def test_zero_is_a_value_where_it_makes_sense(tmp_path: Path) -> None:
    text = (
        LEAST
        + "seed: 0\nlora: {dropout: 0}\ntrain: {weight_decay: 0, warmup_ratio: 0}\nevaluate: {samples: 0}"
    )
    config = load_config(write(tmp_path, text))
    assert (config.seed, config.train.warmup_ratio, config.evaluate.samples) == (0, 0, 0)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    error = fault(tmp_path, "lora: {rnak: 1}\ntrain: {epochs: 0}\n", "nonsense", "seed=x", "train.eps=[")
    said = str(error)
    assert error.code == "HB101"
    for part in (
        "`model` is missing",
        "`data` is missing",
        "lora.rnak",
        "train.epochs",
        "nonsense",
        "`seed`",
        "train.eps=[",
    ):
        assert part in said
    assert "7 fault(s)" in said


@pytest.mark.parametrize("override", ["nonsense", "=3", "train.=3", "train.batch_size", ".seed=1"])
def test_an_override_that_is_none_is_refused(tmp_path: Path, override: str) -> None:
    error = fault(tmp_path, LEAST, override)
    assert error.code == "HB102"
    assert repr(override) in str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "recipe.yaml:1"),
        (b"model: m\nmodel: n\n", "key 'model' is given twice"),
        (b"model: m\nlora: {r: 1, r: 2}\n", "key 'r' is given twice"),
        (b"- a\n", "got list, expected a mapping"),
        (b"", "got nothing, expected a mapping"),
        (b"model: \xff\n", "utf-8"),
        (b"model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert caught.value.code == "HB103"
    assert said in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HB103"):
        load_config(tmp_path / "none.yaml")


def test_every_setting_says_what_it_means() -> None:
    models: list[type[BaseModel]] = [Config, *SECTIONS.values()]
    silent = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert silent == []
    assert "train.learning_rate" in SETTINGS


def test_settings_cannot_be_changed_later(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, LEAST))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_nearest_name_finds_slips_and_nothing_else() -> None:
    assert nearest_name("lerning_rate", ["epochs", "learning_rate"]) == "learning_rate"
    assert nearest_name("zzz", ["epochs", "learning_rate"]) is None


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("[1]", "as many as data.train names: 2"),
        ("[1, 2, 3]", "as many as data.train names: 2"),
        ("[]", "as many as data.train names: 2"),
        ("[1, 0]", "greater than 0"),
        ("[1, -1]", "greater than 0"),
        ("[1, .inf]", "a finite number"),
        ("2", "a valid list"),
    ],
)
def test_weights_are_one_for_each_source_and_greater_than_0(tmp_path: Path, weights: str, said: str) -> None:
    overrides = ["data.train=[a.jsonl, b]", f"data.weights={weights}"]
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, LEAST), overrides)
    assert caught.value.code == "HB102"
    assert said in str(caught.value)
    config = load_config(write(tmp_path, LEAST), [overrides[0], "data.weights=[0.5, 2]"])
    assert config.data.weights == [0.5, 2.0]


@pytest.mark.parametrize(
    ("train", "setting", "chosen"),
    [
        ("{decay_ratio: 0.2}", "decay_ratio", "schedule cosine"),
        ("{schedule: constant, min_lr_ratio: 0.1}", "min_lr_ratio", "schedule constant"),
        ("{optimizer: sgd, beta1: 0.9}", "beta1", "optimizer sgd"),
        ("{optimizer: adafactor, beta2: 0.9}", "beta2", "optimizer adafactor"),
        ("{optimizer: lion, eps: 1e-6}", "eps", "optimizer lion"),
    ],
)
def test_a_setting_that_the_choice_made_does_not_read_is_refused(
    tmp_path: Path, train: str, setting: str, chosen: str
) -> None:
    error = fault(tmp_path, LEAST + f"train: {train}\n")
    assert error.code == "HB102"
    assert f"`train.{setting}`" in error.what
    assert f"train.{chosen} does not read it" in error.what


@pytest.mark.parametrize("train", [{"schedule": "constant"}, {"optimizer": "sgd"}, {"optimizer": "lion"}])
def test_settings_that_are_not_read_may_stand_at_their_defaults(
    tmp_path: Path, train: dict[str, str]
) -> None:
    config = Config.model_validate({"model": "m", "data": {"train": "a"}, "train": train})
    assert load_config(write(tmp_path, config.to_yaml())).train == config.train


def test_a_ratio_of_adapter_matrices_without_an_adapter_is_refused(tmp_path: Path) -> None:
    text = LEAST + "train:\n  lora_plus_ratio: 16.0\n"
    assert load_config(write(tmp_path, text)).train.lora_plus_ratio == 16
    error = fault(tmp_path, text, "method=full")
    assert error.code == "HB102"
    assert "line 4: `train.lora_plus_ratio` got 16.0, expected null: method full" in error.what


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES.keys() - Config.model_fields.keys()))
def test_a_name_of_another_tool_is_refused_with_ours(tmp_path: Path, name: str) -> None:
    error = fault(tmp_path, LEAST + f"{name}: 1\n")
    assert error.code == "HB101"
    leaves = {setting for setting in SETTINGS if setting.rpartition(".")[2] == name}
    assert any(f"did you mean `{ours}`?" in error.what for ours in leaves or {FOREIGN_NAMES[name]})
