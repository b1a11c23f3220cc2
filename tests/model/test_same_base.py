"""Promises of the base's digest: an adapter is refused on other weights, and on nothing that holds the same ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.errors import ModelError
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, add_lora
from halfbyte.model.same_base import base_digest, read_base
from halfbyte.model.saving import save_quantized
from halfbyte.quant.weight import QuantSpec

FLOAT32: dict[str, Any] = {"quantization": None, "dtype": torch.float32}
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def adapter(stories: Path, tmp_path: Path) -> Path:
    model = load(stories, **FLOAT32)
    add_lora(model, LoraSpec(2), seed=0)
    save_adapter(model, tmp_path / "adapter", base=str(stories))
    return tmp_path / "adapter"


@pytest.fixture
def changed(stories: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The same folder with some of its weights changed."""

    def make(change: Change) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(stories, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def _one_layer(tensors: dict[str, Tensor]) -> None:
    """As a short tuning of one weight would: by about a hundredth."""
    weight = tensors["model.layers.2.mlp.up_proj.weight"]
    weight += (
        0.01 * weight.abs().mean() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    )


def _swapped(tensors: dict[str, Tensor]) -> None:
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]
    tensors |= {names[0]: tensors[names[1]], names[1]: tensors[names[0]].clone()}


@pytest.mark.parametrize("change", [_one_layer, _swapped])
def test_an_adapter_is_refused_on_other_weights_of_the_same_shape(
    stories: Path, adapter: Path, changed: Callable[[Change], Path], change: Change
) -> None:
    other = changed(change)
    load(stories, adapter=adapter, **FLOAT32)
    for quantization in (None, QuantSpec()):
        model = load(other, quantization=quantization, dtype=torch.float32)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ModelError) as caught:
            load_adapter(model, adapter)
        assert caught.value.code == "HB349"
        assert f"the weights of {stories} " in caught.value.what
        assert str(other) in caught.value.what
        assert before.keys() == model.state_dict().keys()
    facts = json.loads((adapter / "halfbyte.json").read_text())
    (adapter / "halfbyte.json").unlink()
    load(other, adapter=adapter, **FLOAT32)
    assert facts == {"base": base_digest(load(stories, **FLOAT32))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_in_float32_and_bfloat16_are_one_base(
    shared: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Written by transformers itself, in several files."""
    folder = shared("models/base-11m")
    copy = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    copy.save_pretrained(tmp_path / "copy", max_shard_size="10MB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert base_digest(load(tmp_path / "copy", **FLOAT32)) == base_digest(load(folder, **FLOAT32))


def test_a_folder_in_4_bits_is_the_base_it_was_made_from(
    stories: Path, adapter: Path, tmp_path: Path
) -> None:
    small, again = tmp_path / "small", tmp_path / "again"
    save_quantized(load(stories, quantization=QuantSpec(), dtype=torch.float32), small)
    load(small, adapter=adapter, **FLOAT32)
    save_quantized(load(small, **FLOAT32), again)
    assert read_base(again) == read_base(small) == base_digest(load(stories, **FLOAT32))
    (small / "halfbyte.json").unlink()  # as one that bitsandbytes wrote
    with pytest.raises(ModelError, match="HB349"):
        load(small, adapter=adapter, **FLOAT32)
    model = load(small, **FLOAT32)
    add_lora(model, LoraSpec(2), seed=0)
    save_adapter(model, tmp_path / "beside", base=str(small))
    load(small, adapter=tmp_path / "beside", **FLOAT32)


def test_a_whole_model_is_its_own_base_whatever_lies_beside_it(
    stories: Path, adapter: Path, changed: Callable[[Change], Path]
) -> None:
    other = changed(_one_layer)
    shutil.copy(adapter / "halfbyte.json", other / "halfbyte.json")
    with pytest.raises(ModelError, match="HB349"):
        load(other, adapter=adapter, **FLOAT32)


def test_nothing_is_said_of_a_model_without_a_folder(stories: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(stories, folder)
    model = load(folder, **FLOAT32)
    shutil.rmtree(folder)
    assert base_digest(model) is None
    load_adapter(model, adapter)
    save_adapter(model, tmp_path / "again", base="b")
    assert not (tmp_path / "again" / "halfbyte.json").exists()


@pytest.mark.parametrize("content", ["{", '{"base": 1}', '{"base": "ab"}', f'{{"base": "{"A" * 64}"}}'])
def test_a_damaged_record_is_refused(stories: Path, adapter: Path, content: str) -> None:
    (adapter / "halfbyte.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="HB327"):
        load(stories, adapter=adapter, **FLOAT32)
