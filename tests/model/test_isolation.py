"""Promises of the proof that packed rows do not see each other: true models pass, each kind of leak is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from halfbyte.errors import ModelError
from halfbyte.model.isolation import prove_isolation
from halfbyte.model.loading import load
from halfbyte.quant.weight import QuantSpec

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
APART = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "mistral, sliding": MistralConfig(**SMALL, **HEADS, sliding_window=6),
    "mixtral": MixtralConfig(**SMALL, **HEADS, num_local_experts=4),
    "gpt2, learned positions": GPT2,
}
# Models that have no way to keep packed rows apart in transformers: a state runs through, or there are no positions.
TOGETHER = {
    "mamba": MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "opt": OPTConfig(vocab_size=61, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4),
}


def built(config: PretrainedConfig, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **more)


def refused(model: PreTrainedModel) -> str:
    with pytest.raises(ModelError, match=r"HB317[\s\S]*set train\.packing to false") as caught:
        prove_isolation(model)
    assert caught.value.where == type(model).__name__
    return caught.value.what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", APART.values(), ids=APART)
def test_models_that_keep_rows_apart_pass(
    config: PretrainedConfig, attention: str, dtype: torch.dtype
) -> None:
    prove_isolation(built(config, dtype, attn_implementation=attention))


@pytest.mark.parametrize("name", ["base-11m", "stories260K-hf", "capp-gpt-hf"])
@pytest.mark.parametrize("quantization", [None, QuantSpec()], ids=["dense", "nf4"])
def test_real_models_pass(shared: Callable[[str], Path], name: str, quantization: QuantSpec | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        prove_isolation(load(shared(f"models/{name}"), quantization=quantization, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", TOGETHER.values(), ids=TOGETHER)
def test_models_that_cannot_are_refused(config: PretrainedConfig, dtype: torch.dtype) -> None:
    assert "move by" in refused(built(config, dtype))


@pytest.mark.parametrize("config", APART.values(), ids=APART)
def test_a_planted_leak_is_refused(config: PretrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers no longer sees that positions restart: plain causal attention over the whole row."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    assert "when the rows before it change" in refused(built(config))


def test_a_leak_of_one_token_in_one_layer_is_refused() -> None:
    """The least that can leak: the first token of each document sees the one before it, in the last layer."""
    model = built(APART["llama"], torch.bfloat16)

    def see_the_token_before(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + 1e-2 * args[0].roll(1, dims=1), *args[1:])

    model.lm_head.register_forward_pre_hook(see_the_token_before)
    assert "when the rows before it change" in refused(model)


def test_positions_that_go_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are kept apart by a mask of its own, but learned positions count through the packed row."""
    model = built(GPT2)
    forward = model.forward

    def counting_through(
        input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> Any:
        if position_ids is None:
            return forward(input_ids=input_ids, attention_mask=attention_mask)
        document = (position_ids[0] == 0).cumsum(0)
        apart = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
        mask = torch.zeros(apart.shape).masked_fill(~apart, torch.finfo(torch.float32).min)
        return forward(input_ids=input_ids, attention_mask=mask[None, None])

    monkeypatch.setattr(model, "forward", counting_through)
    assert "away from those of the row alone" in refused(model)


def test_a_model_that_refuses_packed_rows_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(GPT2)

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        raise AssertionError("not reached with packed arguments")

    monkeypatch.setattr(model, "forward", forward)
    assert "fails on packed rows: TypeError" in refused(model)


def test_numbers_that_are_not_finite_prove_nothing() -> None:
    model = built(GPT2)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = float("nan")
    refused(model)


def test_the_model_is_left_as_it_was() -> None:
    model = built(GPT2).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    prove_isolation(model)
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
