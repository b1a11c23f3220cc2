"""Promises of loading: the same model as transformers builds, 4-bit where asked, and every misfit refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]
EditedCopy = Callable[[Path, Callable[[dict[str, torch.Tensor], dict[str, Any]], None]], Path]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")
# The same float32 products summed in another order differ by a few units in the last place (2^-24 each); up to
# six blocks pass that on through two residual additions each, enlarging it by less than four.
LOGIT_TOLERANCE = 2.0**-24 * 12 * 4

UP_PROJ = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))


def refused(folder: Path, code: str, *named: str, quantization: QuantSpec | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(folder, quantization=quantization, dtype=torch.float32)
    assert caught.value.code == code
    assert all(name in caught.value.what for name in named), caught.value.what
    assert caught.value.where
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_without_quantization_everything_is_as_transformers_loads_it(
    shared: Shared, name: str, dtype: torch.dtype
) -> None:
    folder = shared(name)
    expected, got = reference(folder, dtype), load(folder, quantization=None, dtype=dtype)
    assert not got.training
    assert all(parameter.requires_grad for parameter in got.parameters())
    for kind in ("named_parameters", "named_buffers"):
        theirs, ours = dict(getattr(expected, kind)()), dict(getattr(got, kind)())
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype, key
            assert torch.equal(ours[key], tensor), key
    assert got.generation_config.to_dict() == expected.generation_config.to_dict()
    assert got.config.to_dict() == expected.config.to_dict()
    with torch.no_grad():
        ids = tokens(expected)
        expected.set_attn_implementation(got.config._attn_implementation)
        assert torch.equal(got(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec("fp4", "absmax", False, 128), QuantSpec(scales="mse")]
)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_in_4bit_each_layer_stands_for_its_quantised_weight_and_nothing_else_changes(
    shared: Shared, name: str, spec: QuantSpec
) -> None:
    folder = shared(name)
    expected, got = reference(folder), load(folder, quantization=spec, dtype=torch.float32)
    head = expected.get_output_embeddings()
    linear = {
        n: m
        for n, m in expected.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and m is not head
    }
    assert linear.keys() == {n for n, m in got.named_modules() if isinstance(m, Linear4bit)}
    with torch.no_grad():
        for key, module in linear.items():
            transposed = type(module).__name__ == "Conv1D"
            layer = got.get_submodule(key)
            assert isinstance(layer, Linear4bit)
            assert layer.from_conv1d == transposed
            weight = (module.weight.T if transposed else module.weight).contiguous()
            dequantised = ops.dequantize_4bit(ops.quantize_4bit(weight, spec))
            assert torch.equal(ops.dequantize_4bit(layer.quantised_weight), dequantised)
            module.weight.copy_(dequantised.T if transposed else dequantised)
    assert not any(parameter.requires_grad for parameter in got.parameters())
    assert got.get_output_embeddings().weight is got.get_input_embeddings().weight
    with torch.no_grad():
        ids = tokens(expected)
        difference = (got(ids).logits - expected(ids).logits).abs().max()
    assert difference <= LOGIT_TOLERANCE * expected(ids).logits.abs().max()


def test_progress_ends_at_the_total(stories: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(stories, quantization=QuantSpec(), dtype=torch.float32, progress=lambda *done: seen.append(done))
    total = sum(tensor.nbytes for tensor in load_file(stories / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_loading_leaves_the_random_state_alone(stories: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(stories, quantization=QuantSpec(), dtype=torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_a_file_without_the_bases_prefix_is_loaded(stories: Path, edited_copy: EditedCopy) -> None:
    def strip(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    got = load(edited_copy(stories, strip), quantization=None, dtype=torch.float32)
    assert all(
        torch.equal(tensor, dict(got.named_parameters())[name])
        for name, tensor in reference(stories).named_parameters()
    )


def test_buffers_that_old_files_carry_are_ignored(stories: Path, edited_copy: EditedCopy) -> None:
    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), torch.nan)
        tensors["model.embeddings.position_ids"] = torch.arange(4)

    got = load(edited_copy(stories, add), quantization=QuantSpec(), dtype=torch.float32)
    assert torch.equal(got.model.rotary_emb.inv_freq, reference(stories).model.rotary_emb.inv_freq)


def test_gpt2s_old_masks_are_ignored_and_its_biases_are_not(shared: Shared, edited_copy: EditedCopy) -> None:
    def add(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    def drop(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors["transformer.h.1.attn.c_attn.bias"]

    folder = shared("models/capp-gpt-hf")
    load(edited_copy(folder, add), quantization=QuantSpec(), dtype=torch.float32)
    refused(edited_copy(folder, drop), "HB308", "transformer.h.1.attn.c_attn.bias")


def test_a_tied_head_may_be_stored_once_more_or_instead(stories: Path, edited_copy: EditedCopy) -> None:
    def instead(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    folder = edited_copy(stories, instead)
    expected = reference(stories).model.embed_tokens.weight
    for _ in range(2):
        got = load(folder, quantization=None, dtype=torch.float32)
        assert got.lm_head.weight is got.model.embed_tokens.weight
        assert torch.equal(got.lm_head.weight, expected)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
        save_file(tensors, folder / "model.safetensors")


def test_two_weights_that_the_config_calls_one_are_refused(stories: Path, edited_copy: EditedCopy) -> None:
    def untie(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    refused(edited_copy(stories, untie), "HB309", "lm_head.weight", "model.embed_tokens.weight")


def test_an_untied_head_that_is_missing_is_named(stories: Path, edited_copy: EditedCopy) -> None:
    folder = edited_copy(stories, lambda _, config: config.update(tie_word_embeddings=False))
    refused(folder, "HB308", "lm_head.weight")


def test_missing_and_unexpected_tensors_are_named_together(stories: Path, edited_copy: EditedCopy) -> None:
    def rename(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["model.layers.2.mlp.up.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")

    folder = edited_copy(stories, rename)
    refused(folder, "HB308", "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up.weight")


def test_a_tensor_without_a_place_is_named(stories: Path, edited_copy: EditedCopy) -> None:
    folder = edited_copy(stories, lambda tensors, _: tensors.update({"model.extra.weight": torch.ones(1)}))
    refused(folder, "HB309", "model.extra.weight")


def test_one_tensor_under_two_names_is_refused(stories: Path, edited_copy: EditedCopy) -> None:
    folder = edited_copy(
        stories, lambda tensors, _: tensors.update({"norm.weight": tensors["model.norm.weight"] + 1})
    )
    assert refused(folder, "HB309").what.count("norm.weight") == 1


def test_a_tensor_of_another_shape_is_named_with_both(stories: Path, edited_copy: EditedCopy) -> None:
    folder = edited_copy(stories, lambda _, config: config.update(intermediate_size=176))
    refused(folder, "HB310", "(64, 172)", "(64, 176)")


def test_a_tensor_of_another_kind_is_named(stories: Path, edited_copy: EditedCopy) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    folder = edited_copy(stories, lambda tensors, _: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(folder, "HB310", name, "int8")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_is_named(
    stories: Path, edited_copy: EditedCopy, name: str, bad: float
) -> None:
    def poison(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[name].view(-1)[-1] = bad

    refused(edited_copy(stories, poison), "HB311", name, "1 values", quantization=QuantSpec())


def test_an_encoder_is_refused_as_no_causal_model(shared: Shared) -> None:
    refused(shared("models/all-MiniLM-L6-v2-fp16"), "HB312", "BertModel", "BertLMHeadModel")


def test_a_type_without_a_causal_model_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(tmp_path, "HB312", "vit")


def test_generation_settings_that_cannot_be_used_are_refused(stories: Path, edited_copy: EditedCopy) -> None:
    folder = edited_copy(stories, lambda *_: None)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": -5}))
    assert refused(folder, "HB301").where == str(folder / "generation_config.json")


@pytest.mark.parametrize("model_type", ["never-heard-of", None, 3])
def test_an_unknown_type_is_refused(tmp_path: Path, model_type: object) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    refused(tmp_path, "HB313", repr(model_type))


@pytest.mark.parametrize(
    "setting", [{"hidden_act": "nonsense"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}]
)
def test_settings_no_model_can_be_built_from_are_refused(
    stories: Path, edited_copy: EditedCopy, setting: dict[str, object]
) -> None:
    refused(edited_copy(stories, lambda _, config: config.update(setting)), "HB301")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_weights_stored_by_another_quantisation_are_refused(
    stories: Path, edited_copy: EditedCopy, method: str
) -> None:
    def declare(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": method, "load_in_8bit": True}

    def declare_oddly(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["quantization_config"] = method

    for declaration in (declare, declare_oddly):
        refused(edited_copy(stories, declaration), "HB314", method)


def test_a_model_mostly_of_fused_experts_is_refused_in_4bit_and_loaded_without(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
        num_local_experts=4,
    )
    config.architectures = ["MixtralForCausalLM"]
    model = MixtralForCausalLM(config)
    save_file({n: p.detach() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config.to_json_string())
    refused(tmp_path, "HB315", "experts", quantization=QuantSpec())
    load(tmp_path, quantization=None, dtype=torch.float32)


def test_parts_that_a_model_keeps_in_float32_stay_there(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["mlp.down_proj"])
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["norm"])
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        got = load(stories, quantization=QuantSpec(), dtype=dtype)
        assert type(got.model.layers[0].mlp.down_proj) is nn.Linear
        assert got.model.layers[0].mlp.down_proj.weight.dtype == kept
        assert got.model.norm.weight.dtype == torch.float32
        assert isinstance(got.model.layers[0].mlp.up_proj, Linear4bit)


def test_a_buffer_that_nobody_fills_is_named(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = LlamaForCausalLM.__init__

    def with_empty_buffer(self: LlamaForCausalLM, config: LlamaConfig) -> None:
        build(self, config)
        self.register_buffer("left_empty", torch.empty(3), persistent=False)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_empty_buffer)
    refused(stories, "HB308", "left_empty")


def test_a_weight_that_two_linear_layers_share_stays_shared_and_dense(
    stories: Path, edited_copy: EditedCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = LlamaForCausalLM.__init__

    def sharing(self: LlamaForCausalLM, config: LlamaConfig) -> None:
        build(self, config)
        self.model.layers[1].mlp.up_proj.weight = self.model.layers[0].mlp.up_proj.weight

    folder = edited_copy(stories, lambda tensors, _: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    monkeypatch.setattr(LlamaForCausalLM, "__init__", sharing)
    first, second = load(folder, quantization=QuantSpec(), dtype=torch.float32).model.layers[:2]
    assert first.mlp.up_proj.weight is second.mlp.up_proj.weight
    assert torch.equal(first.mlp.up_proj.weight, load_file(stories / "model.safetensors")[UP_PROJ])
    assert isinstance(first.mlp.down_proj, Linear4bit)


def test_layers_with_odd_sizes_and_biases_are_quantised(tmp_path: Path) -> None:
    llama = LlamaConfig(
        hidden_size=30,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=17,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    gpt2 = GPT2Config(
        n_embd=22, n_layer=2, n_head=2, n_positions=16, vocab_size=17, tie_word_embeddings=False
    )
    for number, model in enumerate((LlamaForCausalLM(llama), GPT2LMHeadModel(gpt2))):
        folder = tmp_path / str(number)
        model.eval().save_pretrained(folder)
        got = load(folder, quantization=QuantSpec(), dtype=torch.float32)
        assert got.lm_head.weight is not got.get_input_embeddings().weight
        with torch.no_grad():
            logits = got(tokens(got)).logits
            assert torch.isfinite(logits).all()
            expected = model(tokens(got)).logits
        assert 0 < (logits - expected).abs().max() < expected.abs().max()
