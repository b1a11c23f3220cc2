"""Promises of how LoRA begins: near the original, to the same bits, saved as what it is, refused where it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.model.lora_models import FLOAT32_TOLERANCE, Shared, change, logits, quantised, whole
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.adapters import TAKEN, load_adapter, save_adapter
from halfbyte.model.linear4bit import Linear4bit, dense_weight
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraLinear, adapted_modules, adapters_disabled, add_lora
from halfbyte.model.lora_init import INITS
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.model.saving import save_quantized
from halfbyte.quant.weight import QuantSpec

DECOMPOSING = [
    LoraSpec(8, 12, init="pissa"),
    LoraSpec(8, 12, init="pissa", init_iterations=5),
    LoraSpec(8, 12, init="loftq"),
    LoraSpec(8, 12, init="loftq", init_iterations=5),
]


def name_of(spec: LoraSpec) -> str:
    return f"{spec.init}-{spec.init_iterations}"


def originals(folder: Path) -> dict[str, torch.Tensor]:
    model = load(folder, quantization=None, dtype=torch.float32)
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def errors(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Squared distance of each adapted layer from its original weight."""
    layers = adapted_modules(model)
    return {name: float((whole(layer) - weights[name]).square().sum()) for name, layer in layers.items()}


# Beginnings


@pytest.mark.parametrize("scales", ["absmax", "mse"])
def test_decomposing_beginnings_are_nearer_to_the_original_in_every_layer(
    shared: Shared, scales: str
) -> None:
    folder = shared("models/base-11m")
    weights = originals(folder)
    found = {}
    for spec in (LoraSpec(8, 12), *DECOMPOSING):
        model = quantised(folder, scales=scales)
        add_lora(model, spec, seed=0)
        found[name_of(spec)] = errors(model, weights)
    plain = found.pop("default-1")
    for name, each in found.items():
        assert each.keys() == plain.keys()
        assert all(each[layer] < plain[layer] for layer in plain), name
    total = {name: sum(each.values()) / sum(plain.values()) for name, each in found.items()}
    print(f"\n{scales}: squared weight error over that of plain NF4: ", total)
    assert total["pissa-5"] < total["pissa-1"]
    assert total["loftq-5"] < total["loftq-1"]


@pytest.mark.parametrize("spec", DECOMPOSING, ids=name_of)
def test_the_same_weights_begin_with_the_same_bits(stories: Path, spec: LoraSpec) -> None:
    first, second = quantised(stories), quantised(stories)
    for model in (first, second):
        add_lora(model, spec, seed=0)
    assert torch.equal(logits(first), logits(second))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_gaussian_is_one() -> None:
    layer = LoraLinear(nn.Linear(400, 7), LoraSpec(50, init="gaussian"), torch.Generator().manual_seed(0))
    assert not layer.lora_B.any()
    assert (
        abs(float(layer.lora_A.detach().std()) * 50 - 1) < 0.02
    )  # 20,000 values: the deviation is known to 0.5 %


def test_a_base_that_others_share_is_not_changed_for_them(shared: Shared) -> None:
    model = load(shared("models/base-11m"), quantization=None, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    assert model.lm_head.weight is embedding
    add_lora(model, LoraSpec(4, target_modules=["lm_head"], init="pissa"), seed=0)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.lm_head.base.weight, before)


def test_without_its_adapter_a_model_is_nearer_to_the_original(shared: Shared) -> None:
    folder = shared("models/base-11m")
    exact = logits(load(folder, quantization=None, dtype=torch.float32))
    plain = quantised(folder)
    far = (logits(plain) - exact).square().mean()
    add_lora(plain, LoraSpec(16, init="pissa", init_iterations=5), seed=0)
    change(plain)
    with adapters_disabled(plain):
        near = (logits(plain) - exact).square().mean()
    assert near < far


def test_every_beginning_that_a_setting_can_name_exists() -> None:
    from halfbyte.settings import LoraConfig

    choices = LoraConfig.model_json_schema()["properties"]["init"]["enum"]
    assert choices == list(INITS)


# Files of adapters that hold a part of the weight


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("spec", DECOMPOSING, ids=name_of)
def test_a_4_bit_base_is_made_again_to_the_bit(
    stories: Path, tmp_path: Path, spec: LoraSpec, dora: bool
) -> None:
    model = quantised(stories, scales="mse")
    add_lora(model, LoraSpec(3, 5, init=spec.init, init_iterations=spec.init_iterations, dora=dora), seed=0)
    change(model)
    save_adapter(model, tmp_path / "adapter", base="b")
    back = load(
        stories,
        quantization=QuantSpec(scales="mse"),
        dtype=torch.float32,
        adapter=tmp_path / "adapter",
    )
    assert torch.equal(logits(back), logits(model))
    with adapters_disabled(back), adapters_disabled(model):
        assert torch.equal(logits(back), logits(model))
    save_adapter(back, tmp_path / "again", base="b")
    for file in (tmp_path / "adapter").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("spec", DECOMPOSING, ids=name_of)
def test_on_the_original_weights_an_adapter_is_the_same_change(
    stories: Path, tmp_path: Path, spec: LoraSpec, stabilised: bool
) -> None:
    model = quantised(stories)
    weights = originals(stories)
    add_lora(
        model,
        LoraSpec(3, 5, init=spec.init, init_iterations=spec.init_iterations, rank_stabilised=stabilised),
        seed=0,
    )
    lost = {name: weights[name] - whole(layer) for name, layer in adapted_modules(model).items()}
    change(model)
    save_adapter(model, tmp_path / "adapter", base="b")
    dense = load(stories, quantization=None, dtype=torch.float32, adapter=tmp_path / "adapter")
    for name, layer in adapted_modules(dense).items():
        expected = whole(adapted_modules(model)[name]) + lost[name]
        assert (whole(layer) - expected).abs().max() <= FLOAT32_TOLERANCE * expected.abs().max()
    assert not list(tmp_path.glob("adapter/*/*"))


def test_pissa_takes_a_stored_4_bit_weight_as_it_is(stories: Path, tmp_path: Path) -> None:
    save_quantized(quantised(stories), tmp_path / "4bit")
    model = load(tmp_path / "4bit", quantization=None, dtype=torch.float32)
    held = {n: dense_weight(m) for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    add_lora(model, LoraSpec(8, init="pissa", init_iterations=3), seed=0)
    for name, layer in adapted_modules(model).items():
        far = float((whole(layer) - held[name]).norm() / held[name].norm())
        assert far < 0.08, "4 bits are off by a tenth, and the branch has what is largest"
    change(model)
    save_adapter(model, tmp_path / "adapter", base="b")
    back = load(tmp_path / "4bit", quantization=None, dtype=torch.float32, adapter=tmp_path / "adapter")
    assert torch.equal(logits(back), logits(model))
    with pytest.raises(ModelError, match="HB344"):
        load_adapter(quantised(stories), tmp_path / "adapter")


def test_an_adapter_of_16_bit_weights_is_refused_beside_stored_4_bits(stories: Path, tmp_path: Path) -> None:
    model = quantised(stories)
    save_quantized(model, tmp_path / "4bit")
    add_lora(model, LoraSpec(4, init="loftq"), seed=0)
    save_adapter(model, tmp_path / "adapter", base="b")
    stored = load(tmp_path / "4bit", quantization=None, dtype=torch.float32)
    with pytest.raises(ModelError, match="HB344"):
        load_adapter(stored, tmp_path / "adapter")
    assert not adapted_modules(stored)


def test_what_was_taken_is_checked(stories: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = quantised(stories)
    add_lora(model, LoraSpec(4, init="pissa"), seed=0)
    save_adapter(model, tmp_path, base="b")
    good = load_file(tmp_path / TAKEN)
    key = "stored.model.layers.0.self_attn.q_proj.lora_A"
    for code, tensors in (
        ("HB323", {**good, "something": torch.ones(1)}),
        ("HB325", {name: tensor for name, tensor in good.items() if name != key}),
        ("HB325", {**good, key: torch.ones(3, 64)}),
        ("HB325", {**good, "stored.lm_head.lora_A": torch.ones(4, 64)}),
        ("HB311", {**good, key: good[key] * torch.nan}),
    ):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / TAKEN)
        untouched = quantised(stories)
        with pytest.raises(ModelError, match=code):
            load_adapter(untouched, tmp_path)
        assert not adapted_modules(untouched)


# What cannot begin


def test_loftq_without_original_weights_is_refused(stories: Path, tmp_path: Path) -> None:
    save_quantized(quantised(stories), tmp_path / "4bit")
    stored = load(tmp_path / "4bit", quantization=None, dtype=torch.float32)
    with pytest.raises(ModelError, match="HB340.*stored in 4 bits"):
        add_lora(stored, LoraSpec(4, init="loftq"), seed=0)
    assert not adapted_modules(stored)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_folder_that_is_gone_is_named(stories: Path, tmp_path: Path, init: Any) -> None:
    shutil.copytree(stories, tmp_path / "model")
    model = quantised(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError, match="HB340") as caught:
        add_lora(model, LoraSpec(4, init=init), seed=0)
    assert str(tmp_path / "model") in caught.value.where
    assert not adapted_modules(model)


def test_a_folder_with_other_weights_is_named(stories: Path, tmp_path: Path) -> None:
    model = quantised(stories)
    tokens = model.config.vocab_size
    small = {"vocab_size": tokens, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    LlamaForCausalLM(LlamaConfig(**small, intermediate_size=16)).save_pretrained(tmp_path / "llama")
    gpt2 = GPT2Config(vocab_size=tokens, n_layer=1, n_head=2, n_embd=16)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    for other, named in (("llama", "its layer"), ("gpt2", "there is no")):
        model.config.name_or_path = model.name_or_path = str(tmp_path / other)
        with pytest.raises(ModelError, match="HB340") as caught:
            add_lora(model, LoraSpec(4, init="pissa"), seed=0)
        assert named in caught.value.what


def test_a_rank_beyond_the_layer_is_refused(stories: Path) -> None:
    model = quantised(stories)
    with pytest.raises(ModelError, match="HB341.*k_proj has 32, r is 33"):
        add_lora(model, LoraSpec(33, init="pissa"), seed=0)
    assert not adapted_modules(model)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init": "orthogonal"}, "init is 'orthogonal'"),
        ({"init_iterations": 0, "init": "pissa"}, "init_iterations is 0"),
        ({"init_iterations": 2}, "only pissa and loftq read"),
        ({"init": "loftq", "alpha": -1}, "alpha is -1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of q_proj is 0"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern of q_proj is nan"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match="HB321") as caught:
        LoraSpec(**settings)
    assert named in caught.value.what
