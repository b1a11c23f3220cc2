"""Promises of adapter files: bitwise round trips, nothing half-written, and every strange adapter refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, adapted_modules, add_lora, trainable_parameters
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")


def base_model(folder: Path, quantization: QuantSpec | None = None) -> PreTrainedModel:
    return load(folder, quantization=quantization, dtype=torch.float32)


def adapted_model(folder: Path, spec: LoraSpec, quantization: QuantSpec | None = None) -> PreTrainedModel:
    """A model whose adapters change its answers."""
    model = base_model(folder, quantization)
    add_lora(model, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_modules(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


@pytest.fixture
def saved(stories: Path, tmp_path: Path) -> Path:
    """A good adapter of the smallest model, to be spoilt."""
    folder = tmp_path / "adapter"
    save_adapter(
        adapted_model(stories, LoraSpec(2, 4, target_modules=["q_proj", "v_proj"])), folder, base="the base"
    )
    return folder


def change_config(folder: Path, **settings: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refused(stories: Path, folder: Path, code: str, *named: str) -> ModelError:
    model = base_model(stories)
    with pytest.raises(ModelError) as caught:
        load_adapter(model, folder)
    assert caught.value.code == code
    assert all(name in str(caught.value) for name in named), str(caught.value)
    assert caught.value.where
    assert caught.value.fix
    assert not adapted_modules(model), "the model was touched before the adapter was checked"
    assert all(parameter.requires_grad for parameter in model.parameters())
    return caught.value


@pytest.mark.parametrize("quantization", [None, QuantSpec()])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_an_adapter_comes_back_bit_for_bit(
    shared: Shared, tmp_path: Path, name: str, quantization: QuantSpec | None
) -> None:
    spec = LoraSpec(3, 7.5, dropout=0.25, rank_stabilised=True)
    model = adapted_model(shared(name), spec, quantization)
    save_adapter(model, tmp_path / "adapter", base=name)
    back = load(shared(name), quantization=quantization, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert not back.training
    assert torch.equal(logits(back), logits(model))
    ours, theirs = adapted_modules(model), adapted_modules(back)
    assert list(theirs) == list(ours)
    for module, layer in ours.items():
        assert theirs[module].spec == spec
        assert torch.equal(theirs[module].lora_A, layer.lora_A)
        assert torch.equal(theirs[module].lora_B, layer.lora_B)
    assert len(trainable_parameters(back)) == 2 * len(ours)


def test_saving_again_gives_the_same_bytes(stories: Path, saved: Path, tmp_path: Path) -> None:
    model = load(stories, quantization=None, dtype=torch.float32, adapter=saved)
    save_adapter(model, tmp_path / "again", base="the base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_targets_are_named_as_shortly_as_is_exact(stories: Path, tmp_path: Path) -> None:
    def targets(names: list[str]) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        save_adapter(adapted_model(stories, LoraSpec(2, target_modules=names)), folder, base="b")
        return json.loads((folder / "adapter_config.json").read_text())["target_modules"]

    assert targets(["v_proj", "q_proj"]) == ["q_proj", "v_proj"]
    full = ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"]
    assert targets(full) == full


def test_a_16_bit_adapter_is_read_into_float32(stories: Path, saved: Path) -> None:
    change_tensors(saved, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    stored = load_file(saved / "adapter_model.safetensors")
    model = load(stories, quantization=None, dtype=torch.float32, adapter=saved)
    for name, layer in adapted_modules(model).items():
        assert layer.lora_A.dtype == torch.float32
        assert torch.equal(layer.lora_A, stored[f"base_model.model.{name}.lora_A.weight"].float())


def test_an_adapter_is_not_put_on_another(stories: Path, saved: Path) -> None:
    model = load(stories, quantization=None, dtype=torch.float32, adapter=saved)
    with pytest.raises(ModelError, match="HB322"):
        load_adapter(model, saved)


def test_a_model_without_adapters_saves_none(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="HB322"):
        save_adapter(base_model(stories), tmp_path / "adapter", base="b")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_an_adapter_is_refused(stories: Path, tmp_path: Path) -> None:
    refused(stories, tmp_path, "HB323", "adapter_config.json")
    refused(stories, tmp_path / "nowhere", "HB323", "adapter_config.json")


def test_an_adapter_without_weights_is_refused(stories: Path, saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    refused(stories, saved, "HB323", "adapter_model.safetensors")


class Canary:
    """Whoever unpickles it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_pickled_adapter_is_refused_and_never_opened(stories: Path, saved: Path, tmp_path: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "sprung")))
    refused(stories, saved, "HB303", "adapter_model.bin")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_links_outside_is_refused(stories: Path, saved: Path, tmp_path: Path, name: str) -> None:
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    refused(stories, saved, "HB305", name)


def test_damaged_files_are_refused(stories: Path, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(stories, saved, "HB307", "adapter_model.safetensors")
    file.write_bytes(whole)
    (saved / "adapter_config.json").write_text("{")
    refused(stories, saved, "HB301", "adapter_config.json")


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": "yes"},
        {"peft_type": "LOHA"},
        {"task_type": "QUESTION_ANS"},
        {"bias": "some"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": 1},
        {"use_rslora": "yes"},
        {"layers_to_transform": [0]},
        {"auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"}},
        {"megatron_config": {"tensor_parallel": 2}},
        {"use_qalora": True},
        {"lora_bias": True},
        {"trainable_token_indices": [1]},
        {"something_new": "in the next version"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_feature_that_is_not_supported_is_named(
    stories: Path, saved: Path, setting: dict[str, object]
) -> None:
    change_config(saved, **setting)
    ((key, value),) = setting.items()
    refused(stories, saved, "HB324", key, repr(value))


def test_an_adapter_of_no_stated_kind_is_refused(stories: Path, saved: Path) -> None:
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["peft_type"]
    file.write_text(json.dumps(config))
    refused(stories, saved, "HB324", "peft_type")


def test_wrong_values_are_named_at_once(stories: Path, saved: Path) -> None:
    change_config(saved, r="2", lora_alpha=None, lora_dropout=True, target_modules=[1])
    refused(stories, saved, "HB323", "r is '2'", "lora_alpha", "lora_dropout", "target_modules")


def test_patterns_and_modules_of_the_wrong_kind_are_named(stories: Path, saved: Path) -> None:
    change_config(saved, rank_pattern={"q_proj": 2.5}, alpha_pattern=["v_proj"], modules_to_save="lm_head")
    refused(stories, saved, "HB323", "rank_pattern", "alpha_pattern", "modules_to_save")


def test_settings_that_name_what_is_not_in_the_file_are_refused(stories: Path, saved: Path) -> None:
    before = (saved / "adapter_config.json").read_bytes()
    change_config(saved, use_dora=True)
    refused(stories, saved, "HB323", "magnitude")
    (saved / "adapter_config.json").write_bytes(before)
    change_config(saved, rank_pattern={"q_proj": 4})
    refused(stories, saved, "HB325", "(2, 64)", "(4, 64)")
    (saved / "adapter_config.json").write_bytes(before)
    change_config(saved, modules_to_save=["lm_head"])
    refused(stories, saved, "HB325", "lm_head")


@pytest.mark.parametrize("pattern", ["(", "(x+x+)+y", r"(x)\1", "a*b*c*d*"])
def test_a_pattern_that_could_run_for_ever_is_refused(stories: Path, saved: Path, pattern: str) -> None:
    change_config(saved, alpha_pattern={pattern: 4})
    with pytest.raises(ModelError, match="HB321") as caught:
        load_adapter(base_model(stories), saved)
    assert repr(pattern) in caught.value.what


def test_values_out_of_range_are_named(stories: Path, saved: Path) -> None:
    change_config(saved, r=-2)
    with pytest.raises(ModelError, match=r"HB321.*r is -2"):
        load_adapter(base_model(stories), saved)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_is_no_lora_matrix_is_named(stories: Path, saved: Path, key: str) -> None:
    change_tensors(saved, lambda tensors: tensors.update({key: torch.ones(2, 2)}))
    refused(stories, saved, "HB324", key)


def test_half_a_pair_of_matrices_is_refused(stories: Path, saved: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    change_tensors(saved, lambda tensors: tensors.pop(f"base_model.model.{module}.lora_B.weight"))
    refused(stories, saved, "HB323", module)


def test_a_matrix_of_another_shape_is_named_with_the_base_it_was_made_for(stories: Path, saved: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    change_tensors(saved, lambda t: t.update({f"base_model.model.{module}.lora_A.weight": torch.ones(2, 65)}))
    refused(stories, saved, "HB325", module, "(2, 65)", "(2, 64)", "the base")


def test_a_rank_other_than_the_settings_say_is_refused(stories: Path, saved: Path) -> None:
    change_config(saved, r=4)
    refused(stories, saved, "HB325", "(2, 64)", "(4, 64)")


def test_an_adapter_of_another_model_is_refused_with_its_name(
    shared: Shared, stories: Path, saved: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        load_adapter(base_model(shared("models/capp-gpt-hf")), saved)
    assert caught.value.code == "HB325"
    assert "the base" in caught.value.fix
    assert "capp-gpt-hf" in caught.value.fix
    assert "model.layers.0.self_attn.q_proj" in caught.value.what


def test_matrices_that_the_settings_name_and_the_file_lacks_are_named(stories: Path, saved: Path) -> None:
    module = "model.layers.4.self_attn.v_proj"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for matrix in "AB":
            del tensors[f"base_model.model.{module}.lora_{matrix}.weight"]

    change_tensors(saved, drop)
    refused(stories, saved, "HB325", "lacks", module)


def test_matrices_that_the_settings_do_not_name_are_named(stories: Path, saved: Path) -> None:
    change_config(saved, target_modules=["q_proj"])
    refused(stories, saved, "HB325", "do not name", "v_proj")


def test_a_pattern_of_a_stranger_is_not_run(stories: Path, saved: Path) -> None:
    change_config(saved, target_modules="(x+x+)+y" * 3)
    assert len(load_adapter(base_model(stories), saved)) == 10


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_is_refused(stories: Path, saved: Path, bad: float) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change_tensors(saved, lambda tensors: tensors[key].view(-1)[3:4].fill_(bad))
    refused(stories, saved, "HB311", key)
