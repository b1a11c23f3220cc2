"""Promises of LoRA's variants: patterns, DoRA, modules that train whole: what each trains, and that it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model.lora_models import FLOAT32_TOLERANCE, change, logits, quantised
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.model.beside import trained_modules
from halfbyte.model.blocks import describe
from halfbyte.model.linear4bit import Linear4bit, dense_weight
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraLinear, adapted_modules, adapters_disabled, add_lora
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.quant.weight import QuantSpec

# Patterns


def test_patterns_decide_rank_and_scale_of_the_layers_they_mean(stories: Path) -> None:
    model = quantised(stories)
    spec = LoraSpec(
        4, 8, rank_pattern={"q_proj": 2, r"layers\.[01]\.mlp\..*": 3}, alpha_pattern={"proj": 1, "up_proj": 6}
    )
    with pytest.raises(ModelError, match="HB343.*'proj'"):
        add_lora(model, spec, seed=0)
    spec = LoraSpec(4, 8, rank_pattern=spec.rank_pattern, alpha_pattern={"up_proj": 6})
    add_lora(model, spec, seed=0)
    ranks = {name: layer.lora_A.shape[0] for name, layer in adapted_modules(model).items()}
    scales = {name: layer.spec.scale for name, layer in adapted_modules(model).items()}
    assert (ranks["model.layers.4.self_attn.q_proj"], scales["model.layers.4.self_attn.q_proj"]) == (2, 4.0)
    assert (ranks["model.layers.1.mlp.up_proj"], scales["model.layers.1.mlp.up_proj"]) == (3, 2.0)
    assert (ranks["model.layers.2.mlp.up_proj"], scales["model.layers.2.mlp.up_proj"]) == (4, 1.5)
    assert all(kind.fused for kind in describe(model))


# DoRA


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["4bit", "linear", "conv1d"])
def test_dora_s_output_and_gradients_are_those_of_the_formula(kind: str, dropout: float) -> None:
    N, K = 7, 10
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    base: nn.Module = nn.Linear(K, N) if kind == "linear" else Conv1D(N, K)
    if kind == "4bit":
        base = Linear4bit(ops.quantize_4bit(weight), bias)
    else:
        base.weight.data.copy_(weight if kind == "linear" else weight.T)  # type: ignore[operator, union-attr]
        base.bias.data.copy_(bias)  # type: ignore[operator, union-attr]
    base.requires_grad_(False)
    W = dense_weight(base).double()
    layer = LoraLinear(base, LoraSpec(3, 5, dropout=dropout, dora=True), generator)
    assert layer.magnitude is not None
    assert torch.allclose(layer.magnitude.double(), W.norm(dim=1))
    layer.lora_B.data.normal_(generator=generator)
    layer.magnitude.data += 0.3
    x = torch.randn(2, 5, K, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 5, N, generator=generator)
    torch.manual_seed(9)
    y = layer(x)
    y.backward(upstream)

    A, B, m, X = (
        t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude, x)
    )
    torch.manual_seed(9)
    dropped = X * F.dropout(torch.ones_like(x), dropout).double()
    norm = (W + 5 / 3 * B @ A).norm(dim=1).detach()
    expected = X @ W.T + bias.double() + (m / norm - 1) * (dropped @ W.T)
    expected = expected + m / norm * 5 / 3 * (dropped @ A.T @ B.T)
    expected.backward(upstream.double())
    pairs = ((y, expected), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad), (x.grad, X.grad))
    for got, wanted in (*pairs, (layer.magnitude.grad, m.grad)):
        assert got is not None
        assert wanted is not None
        assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()


def test_layers_with_dora_run_unfused_and_are_named(stories: Path) -> None:
    model = quantised(stories)
    add_lora(
        model, LoraSpec(4, target_modules=["model.layers.1.self_attn.q_proj", "up_proj"], dora=True), seed=0
    )
    assert {(kind.fused, kind.why) for kind in describe(model)} == {(False, "DoRA rescales its projections")}
    with adapters_disabled(model):
        assert all(kind.fused for kind in describe(model))
    some = quantised(stories)
    add_lora(some, LoraSpec(4, target_modules=["model.layers.1.self_attn.q_proj"], dora=True), seed=0)
    assert [(kind.layers, kind.fused) for kind in describe(some)] == [(4, True), (1, False)]


def test_a_row_of_zeros_can_learn_under_dora() -> None:
    base = nn.Linear(10, 3, bias=False).requires_grad_(False)
    base.weight[1] = 0
    layer = LoraLinear(base, LoraSpec(2, dora=True), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), base(x))
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x)[:, 1] - 1).square().sum().backward()
        optimizer.step()
    y = layer(x)
    assert y.isfinite().all()
    assert y[:, 1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_answers_as_its_base_and_all_of_it_trains(stories: Path, dtype: torch.dtype) -> None:
    model = load(stories, quantization=QuantSpec(), dtype=dtype)
    before = logits(model)
    add_lora(model, LoraSpec(4, dora=True), seed=0)
    # One rounding of the product, and one of the bias, in each of 35 layers.
    assert (logits(model) - before).abs().max() <= 35 * torch.finfo(dtype).eps * before.abs().max()
    model.train()
    ids = torch.arange(12)[None]
    for _ in range(2):  # A has no gradient while B is zero
        model(ids, labels=ids).loss.backward()
        change(model)
    for layer in adapted_modules(model).values():
        for parameter in layer.parameters(recurse=False):
            assert parameter.grad is not None
            assert parameter.dtype == torch.float32
            assert parameter.grad.any()


# Modules that train whole


def test_modules_train_whole_in_float32_beside_a_frozen_16_bit_base(stories: Path) -> None:
    model = load(stories, quantization=QuantSpec(), dtype=torch.bfloat16)
    before = logits(model)
    add_lora(model, LoraSpec(4, modules_to_save=["lm_head", "embed_tokens", "model.norm"]), seed=0)
    beside = trained_modules(model)
    assert list(beside) == ["model.embed_tokens", "model.norm", "lm_head"]
    trained = {id(p) for module in beside.values() for p in module.trained.parameters()}
    matrices = {id(p) for layer in adapted_modules(model).values() for p in layer.parameters(recurse=False)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained | matrices
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert len(trained) == 3, "embedding and head are one weight no more"
    # The norm and the head round once less than in bfloat16.
    assert (logits(model) - before).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * before.abs().max()
    change(model)
    assert (logits(model) - before).abs().max() > 0.5
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)


def test_layers_inside_a_module_that_trains_whole_are_not_adapted(stories: Path) -> None:
    model = load(stories, quantization=None, dtype=torch.float32)
    names = add_lora(model, LoraSpec(4, modules_to_save=["layers.0.mlp", "layers.0.mlp.up_proj"]), seed=0)
    assert list(trained_modules(model)) == ["model.layers.0.mlp"]
    assert not [name for name in names if "layers.0.mlp" in name]
    assert "model.layers.1.mlp.up_proj" in names
    assert [(kind.layers, kind.fused) for kind in describe(model)] == [(1, False), (4, True)]


def test_a_model_that_would_train_whole_and_not_be_adapted_is_refused(stories: Path) -> None:
    model = load(stories, quantization=None, dtype=torch.float32)
    with pytest.raises(ModelError, match="HB320.*trains whole"):
        add_lora(model, LoraSpec(4, modules_to_save=["model"]), seed=0)
    assert not trained_modules(model)


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("q_proj", "held in 4 bits"),
        ("mlp", "held in 4 bits"),
        ("heads", "names no module"),
        ("act_fn", "no weights"),
    ],
)
def test_what_cannot_train_whole_is_named(stories: Path, wanted: str, named: str) -> None:
    model = quantised(stories)
    with pytest.raises(ModelError, match="HB342") as caught:
        add_lora(model, LoraSpec(4, modules_to_save=["lm_head", wanted]), seed=0)
    assert wanted in caught.value.what
    assert named in caught.value.what
    assert not trained_modules(model)
