"""Promises of the 4-bit file: laid out so that layers can be read one by one, and known again by its digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.model.families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.errors import ModelError
from halfbyte.model.loading import load
from halfbyte.model.quantised_file import KEY, PAGE, read_digests
from halfbyte.model.saving import save_quantized
from halfbyte.model.stored import read_header
from halfbyte.quant.weight import QuantSpec

Facts = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of three layers in 4 bits, all sizes multiples of 64."""
    return quantised_llama(tmp_path / "model", seed=0)


def quantised_llama(target: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"intermediate_size": 128, "vocab_size": 128, "num_hidden_layers": 3, "num_key_value_heads": 4}
    config = AutoConfig.for_model("llama", **{**FAMILIES["llama"], **sizes})
    source = target.with_name(f"{target.name}-16")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    save_quantized(load(source, quantization=QuantSpec(), dtype=torch.bfloat16), target)
    return target


def test_a_layer_is_one_stretch_in_the_order_of_use(folder: Path) -> None:
    tensors = read_header(folder / "model.safetensors")
    digests = read_digests(folder)
    assert digests is not None
    layers = [f"model.layers.{i}" for i in range(3)]
    assert list(digests.units) == ["rest", "embed", *layers, "head"]
    starts = [extent.begin for extent, _ in digests.units.values()]
    assert starts == sorted(starts)
    assert starts[0] % PAGE == starts[1] % PAGE == 0
    for layer in layers:
        extent, _ = digests.units[layer]
        inside = [n for n, t in tensors.items() if extent.begin <= t.start < extent.end]
        used = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
        assert inside == [f"{layer}.{p}.weight{part}" for p in used for part in ("", ".absmax")]
        assert all(tensors[name].start % 64 == 0 for name in inside)
    extent, _ = digests.units["rest"]
    assert not any(t.nbytes > PAGE for t in tensors.values() if t.start < extent.end)
    assert tensors["model.embed_tokens.weight"].start == digests.units["embed"][0].begin
    assert tensors["lm_head.weight"].start == digests.units["head"][0].begin


def test_the_format_s_own_reader_finds_every_tensor_and_blanks_after_the_state(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    states = {name: bytes(t.numpy()) for name, t in tensors.items() if "quant_state" in name}
    assert len(states) == 3 * 7
    assert all(json.loads(state)["blocksize"] == 64 for state in states.values())
    *others, last = sorted(states.values(), key=len)
    assert all(len(state) % 64 == 0 for state in others)
    assert 0 < len(last) - len(others[-1]) < PAGE, "it fills the page"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_digests_are_those_of_the_bytes(folder: Path) -> None:
    facts = json.loads((folder / "halfbyte.json").read_text())[KEY]
    content = (folder / "model.safetensors").read_bytes()
    assert facts["file_bytes"] == len(content)
    for unit in facts["units"].values():
        assert unit["sha256"] == hashlib.sha256(content[unit["begin"] : unit["end"]]).hexdigest()
    begin = facts["units"]["rest"]["begin"]
    assert facts["header_sha256"] == hashlib.sha256(content[:begin]).hexdigest()
    assert facts["units"]["head"]["end"] == len(content)


def change(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def cut(folder: Path, other: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    return f"expected {len(content):,} bytes, found {len(content) - 1:,}"


def edit_header(folder: Path, other: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"np"'))
    return "expected a header of SHA-256 "


def edit_small(folder: Path, other: Path) -> str:
    change(folder / "model.safetensors", read_header(folder / "model.safetensors")["model.norm.weight"].start)
    return "rest (bytes "


def exchange(folder: Path, other: Path) -> str:
    shutil.copyfile(quantised_llama(other, seed=1) / "model.safetensors", folder / "model.safetensors")
    return "rest (bytes "


@pytest.mark.parametrize("residency", [None, "resident", "streamed"])
@pytest.mark.parametrize(
    ("harm", "code"), [(cut, "HB358"), (edit_header, "HB358"), (edit_small, "HB359"), (exchange, "HB359")]
)
def test_a_file_that_is_not_the_one_that_was_written_is_not_loaded(
    folder: Path, tmp_path: Path, harm: Callable[[Path, Path], str], code: str, residency: Any
) -> None:
    said = harm(folder, tmp_path / "other")
    with pytest.raises(ModelError) as caught:
        load(folder, quantization=None, dtype=torch.bfloat16, residency=residency)
    assert caught.value.code == code
    assert said in caught.value.what
    assert caught.value.where == str(folder / "model.safetensors")


@pytest.mark.parametrize("unit", ["embed", "model.layers.1", "head"])
def test_one_changed_bit_of_a_unit_is_found_with_both_digests(folder: Path, unit: str) -> None:
    digests = read_digests(folder)
    assert digests is not None
    content = (folder / "model.safetensors").read_bytes()
    extent, expected = digests.units[unit]
    digests.check(unit, content[extent.begin : extent.end])
    digests.check_all()
    change(folder / "model.safetensors", extent.end - 1)
    damaged = (folder / "model.safetensors").read_bytes()[extent.begin : extent.end]
    for check in (lambda: digests.check(unit, damaged), digests.check_all):
        with pytest.raises(ModelError) as caught:
            check()
        assert caught.value.code == "HB359"
        assert caught.value.what.startswith(f"{unit} (bytes ")
        assert expected in caught.value.what
        assert hashlib.sha256(damaged).hexdigest() in caught.value.what


def without(key: str) -> Callable[[Facts], object]:
    return lambda facts: facts.pop(key)


@pytest.mark.parametrize(
    "harm",
    [
        without("units"),
        without("header_sha256"),
        lambda facts: facts.update(file_bytes="many"),
        lambda facts: facts["units"].pop("rest"),
        lambda facts: facts["units"].pop("model.layers.1"),
        lambda facts: facts["units"]["head"].update(end=facts["file_bytes"] + 1),
        lambda facts: facts["units"]["head"].pop("sha256"),
        lambda facts: facts.update(units=[]),
    ],
)
def test_digests_that_are_damaged_are_refused(folder: Path, harm: Callable[[Facts], object]) -> None:
    facts = json.loads((folder / "halfbyte.json").read_text())
    harm(facts[KEY])
    (folder / "halfbyte.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError) as caught:
        load(folder, quantization=None, dtype=torch.bfloat16)
    assert caught.value.code == "HB365"
    assert caught.value.where == str(folder / "halfbyte.json")


def test_facts_that_are_no_json_are_refused(folder: Path) -> None:
    (folder / "halfbyte.json").write_text("{")
    with pytest.raises(ModelError, match="HB365"):
        read_digests(folder)


def test_a_folder_of_another_tool_is_loaded_unchecked(folder: Path) -> None:
    (folder / "halfbyte.json").unlink()
    assert read_digests(folder) is None
    change(folder / "model.safetensors", read_header(folder / "model.safetensors")["model.norm.weight"].start)
    load(folder, quantization=None, dtype=torch.bfloat16)
