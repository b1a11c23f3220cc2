"""Promises of writing: a folder is there whole or not at all, and what is in 4 bits comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, add_lora
from halfbyte.model.saving import save_quantized, whole_folder
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")
SPECS = (QuantSpec(), QuantSpec("fp4", "absmax", False, 128), QuantSpec("nf4", "mse", True, 256))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep"
    with whole_folder(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
    assert names(target) == {"a"}
    assert names(target.parent) == {"deep"}


def write_and_fail(target: Path) -> None:
    with whole_folder(target) as work:
        (work / "a").write_text("half")
        raise RuntimeError("planted")


def test_nothing_is_left_when_writing_fails_and_what_was_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(RuntimeError, match="planted"):
        write_and_fail(target)
    assert not list(tmp_path.iterdir())
    with whole_folder(target) as work:
        (work / "a").write_text("whole")
    with pytest.raises(RuntimeError, match="planted"):
        write_and_fail(target)
    assert names(tmp_path) == {"target"}
    assert (target / "a").read_text() == "whole"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught, whole_folder(tmp_path / "target"):
        raise OSError(28, "No space left on device")
    assert caught.value.code == "HB316"
    assert "No space" in caught.value.what
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_files_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "target") as work:
            (work / "a").write_text(text)
    assert (tmp_path / "target" / "a").read_text() == "new"
    assert names(tmp_path) == {"target"}


@pytest.mark.parametrize("kind", ["foreign file", "file", "link"])
def test_files_of_others_are_never_lost(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "foreign file":
        target.mkdir()
        (target / "thesis.tex").write_text("years")
    elif kind == "file":
        target.write_text("years")
    else:
        (tmp_path / "real").mkdir()
        target.symlink_to("real")
    before = names(tmp_path)
    with pytest.raises(ModelError) as caught, whole_folder(target) as work:
        (work / "a").write_text("1")
    assert caught.value.code == "HB316"
    assert names(tmp_path) == before
    if kind == "foreign file":
        assert "thesis.tex" in caught.value.what
        assert names(target) == {"thesis.tex"}


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="HB316"), whole_folder(tmp_path / "file" / "target"):
        pytest.fail("there is nowhere to write")


def everything(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_4bit_folder_comes_back_bit_for_bit(
    shared: Shared, tmp_path: Path, name: str, spec: QuantSpec
) -> None:
    model = load(shared(name), quantization=spec, dtype=torch.bfloat16)
    save_quantized(model, tmp_path / "saved")
    for asked in (None, spec):
        back = load(tmp_path / "saved", quantization=asked, dtype=torch.bfloat16)
        ours, theirs = everything(model), everything(back)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())
        assert not any(parameter.requires_grad for parameter in back.parameters())
        for key, layer in model.named_modules():
            if isinstance(layer, Linear4bit):
                assert repr(back.get_submodule(key)) == repr(layer)
    save_quantized(back, tmp_path / "again")
    assert names(tmp_path / "again") == names(tmp_path / "saved")
    for file in names(tmp_path / "saved"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes(), file


def test_tokenizer_files_come_along(stories: Path, tmp_path: Path) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    copied = {file for file in names(stories) if "token" in file}
    assert copied
    for file in copied:
        assert (tmp_path / "saved" / file).read_bytes() == (stories / file).read_bytes()


def test_a_model_that_is_not_in_4bit_is_refused(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="HB315"):
        save_quantized(load(stories, quantization=None, dtype=torch.float32), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_with_adapters_is_refused(stories: Path, tmp_path: Path) -> None:
    model = load(stories, quantization=QuantSpec(), dtype=torch.float32)
    add_lora(model, LoraSpec(2), seed=0)
    with pytest.raises(ModelError, match="HB322"):
        save_quantized(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (QuantSpec("fp4"), "format nf4"),
        (QuantSpec(double_quant=False), "double_quant True"),
        (QuantSpec(blocksize=128), "blocksize 64"),
    ],
)
def test_another_quantisation_than_the_stored_one_is_refused(
    stories: Path, tmp_path: Path, asked: QuantSpec, named: str
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    load(tmp_path / "saved", quantization=QuantSpec(scales="mse"), dtype=torch.float32)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "saved", quantization=asked, dtype=torch.float32)
    assert caught.value.code == "HB314"
    assert named in caught.value.what


@pytest.mark.parametrize(
    "part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "codes"]
)
def test_a_damaged_4bit_weight_is_refused_by_name(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path], part: str
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    weight = "model.layers.1.mlp.up_proj.weight"

    def shorten(tensors: dict[str, torch.Tensor], config: object) -> None:
        entry = {"codes": weight, "quant_state": f"{weight}.quant_state.bitsandbytes__nf4"}
        key = entry.get(part, f"{weight}.{part}")
        tensors[key] = tensors[key][: len(tensors[key]) // 2]

    with pytest.raises(ModelError) as caught:
        load(edited_copy(tmp_path / "saved", shorten), quantization=None, dtype=torch.float32)
    assert caught.value.code == "HB314"
    assert weight in caught.value.where


def test_a_4bit_weight_with_a_scale_that_is_not_finite_is_refused(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path]
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    weight = "model.layers.1.mlp.up_proj.weight"
    folder = edited_copy(tmp_path / "saved", lambda t, _: t[f"{weight}.nested_absmax"].fill_(torch.nan))
    with pytest.raises(ModelError) as caught:
        load(folder, quantization=None, dtype=torch.float32)
    assert caught.value.code == "HB311"
    assert weight in caught.value.what


def test_a_4bit_weight_of_another_shape_is_refused(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path]
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    folder = edited_copy(tmp_path / "saved", lambda _, config: config.update(intermediate_size=176))
    with pytest.raises(ModelError) as caught:
        load(folder, quantization=None, dtype=torch.float32)
    assert caught.value.code == "HB314"
    assert "(64, 172)" in caught.value.what
    assert "(64, 176)" in caught.value.what


def test_a_4bit_weight_where_no_linear_layer_is_is_refused(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path]
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")

    def move(tensors: dict[str, torch.Tensor], config: object) -> None:
        for key in [key for key in tensors if key.startswith("model.layers.0.mlp.up_proj.")]:
            tensors["lm_head." + key.removeprefix("model.layers.0.mlp.up_proj.")] = tensors[key].clone()

    with pytest.raises(ModelError) as caught:
        load(edited_copy(tmp_path / "saved", move), quantization=None, dtype=torch.float32)
    assert caught.value.code == "HB314"
    assert "lm_head.weight" in caught.value.what


def test_a_config_and_weights_that_disagree_on_4bit_are_refused(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path]
) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    silent = edited_copy(tmp_path / "saved", lambda _, config: config.pop("quantization_config"))
    boastful = edited_copy(stories, lambda _, config: config.update(quantization_config=stored))
    for folder in (silent, boastful):
        for asked in (None, QuantSpec()):
            with pytest.raises(ModelError) as caught:
                load(folder, quantization=asked, dtype=torch.float32)
            assert caught.value.code == "HB314"


def test_codes_stored_in_wider_elements_are_the_same_codes(
    stories: Path, tmp_path: Path, edited_copy: Callable[..., Path]
) -> None:
    model = load(stories, quantization=QuantSpec(), dtype=torch.float32)
    save_quantized(model, tmp_path / "saved")

    def widen(tensors: dict[str, torch.Tensor], config: object) -> None:
        for key in [key for key in tensors if f"{key}.absmax" in tensors]:
            tensors[key] = tensors[key].reshape(-1).view(torch.bfloat16)

    back = load(edited_copy(tmp_path / "saved", widen), quantization=None, dtype=torch.float32)
    assert all(torch.equal(everything(back)[key], tensor) for key, tensor in everything(model).items())


def test_the_config_says_how_the_weights_are_stored(stories: Path, tmp_path: Path) -> None:
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.bfloat16), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    stored = config["quantization_config"]
    assert stored["quant_method"] == "bitsandbytes"
    assert stored["load_in_4bit"] is True
    assert stored["bnb_4bit_quant_type"] == "nf4"
    assert stored["llm_int8_skip_modules"] == ["lm_head"]
