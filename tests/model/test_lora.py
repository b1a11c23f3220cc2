"""Promises of LoRA: the model starts as its base, only the adapters train, and a wrong target is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import (
    LoraLinear,
    LoraSpec,
    adapted_modules,
    adapters_disabled,
    add_lora,
    trainable_parameters,
)
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]

REAL_MODELS = {
    "models/base-11m": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "models/stories260K-hf": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "models/capp-gpt-hf": ("c_attn", "c_proj", "c_fc"),
}
R, N, K = 3, 7, 10

# float32 sums of a few dozen products: each of at most 64 roundings of half a unit in the last place.
FLOAT32_TOLERANCE = 64 * 2.0**-24


@pytest.fixture
def model(stories: Path) -> PreTrainedModel:
    return load(stories, quantization=QuantSpec(), dtype=torch.float32)


def tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens(model)).logits
    return out


def randomise(model: nn.Module) -> None:
    """Fill B, which starts at zero, so that the adapters change the answers."""
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_modules(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=generator)


def dense(kind: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A base layer of each kind, its (N, K) matrix and its bias."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(N, K, generator=generator), torch.randn(N, generator=generator)
    if kind == "4bit":
        quantised = ops.quantize_4bit(weight, QuantSpec())
        return Linear4bit(quantised, bias), ops.dequantize_4bit(quantised), bias
    base = nn.Linear(K, N) if kind == "linear" else Conv1D(N, K)
    base.weight.data.copy_(weight if kind == "linear" else weight.T)
    base.bias.data.copy_(bias)
    return base.requires_grad_(False), weight, bias


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", ["4bit", "linear", "conv1d"])
def test_output_and_gradients_are_those_of_the_formula(kind: str, stabilised: bool) -> None:
    base, weight, bias = dense(kind)
    generator = torch.Generator().manual_seed(3)
    layer = LoraLinear(base, LoraSpec(R, alpha=5, rank_stabilised=stabilised), generator)
    layer.lora_B.data.normal_(generator=generator)
    x = torch.randn(2, 5, K, generator=generator, requires_grad=True)
    upstream = torch.randn(2, 5, N, generator=generator)
    layer(x).backward(upstream)

    A, B, X = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    scale = 5 / (R**0.5 if stabilised else R)
    expected = X @ weight.double().T + bias.double() + scale * (X @ A.T) @ B.T
    expected.backward(upstream.double())
    pairs = ((layer(x), expected), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad), (x.grad, X.grad))
    for got, wanted in pairs:
        assert got is not None
        assert wanted is not None
        assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()


def test_the_first_values_are_lora_s() -> None:
    layer = LoraLinear(nn.Linear(400, N), LoraSpec(50), torch.Generator().manual_seed(0))
    bound = 400**-0.5  # kaiming uniform with a = sqrt(5): sqrt(6 / ((1 + 5) K))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.lora_B.any()
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound


@pytest.mark.parametrize("name", REAL_MODELS)
def test_a_model_with_fresh_adapters_answers_as_its_base(shared: Shared, name: str) -> None:
    model = load(shared(name), quantization=QuantSpec(), dtype=torch.float32)
    before = logits(model)
    names = add_lora(model, LoraSpec(4, 8), seed=0)
    assert torch.equal(logits(model), before)
    assert {adapted.rpartition(".")[2] for adapted in names} == set(REAL_MODELS[name])
    assert list(adapted_modules(model)) == names
    assert "lm_head" not in names


@pytest.mark.parametrize("name", REAL_MODELS)
def test_one_step_lowers_the_loss_and_only_adapters_have_gradients(shared: Shared, name: str) -> None:
    model = load(shared(name), quantization=QuantSpec(), dtype=torch.float32)
    add_lora(model, LoraSpec(4, 8), seed=0)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.05)
    loss = model(tokens(model), labels=tokens(model)).loss
    loss.backward()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if key.endswith("lora_B"):
            assert parameter.grad is not None
            assert parameter.grad.any(), key
    optimizer.step()
    with torch.no_grad():
        assert model(tokens(model), labels=tokens(model)).loss < loss
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in frozen.items())


def test_the_same_seed_gives_the_same_adapters_whatever_happened_before(stories: Path) -> None:
    def matrices(seed: int) -> list[torch.Tensor]:
        torch.rand(seed + 3)
        model = load(stories, quantization=None, dtype=torch.float32)
        add_lora(model, LoraSpec(2), seed)
        return [parameter.detach() for parameter in trainable_parameters(model)]

    first, again, other = matrices(0), matrices(0), matrices(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], 5),
        (["q_proj", "down_proj"], 10),
        (["self_attn.q_proj"], 5),
        (["model.layers.1.mlp.up_proj"], 1),
        (["layers.1.mlp.up_proj", "lm_head"], 2),
    ],
)
def test_targets_are_full_names_or_ends_after_a_dot(
    model: PreTrainedModel, targets: list[str], expected: int
) -> None:
    names = add_lora(model, LoraSpec(2, target_modules=targets), seed=0)
    assert len(names) == expected
    assert all(any(name == t or name.endswith(f".{t}") for t in targets) for name in names)


@pytest.mark.parametrize(
    ("target", "near"), [("q_porj", "q_proj"), ("proj", "q_proj"), ("embed_tokens", ""), ("", "")]
)
def test_a_target_that_matches_nothing_is_refused_with_what_is_near(
    model: PreTrainedModel, target: str, near: str
) -> None:
    with pytest.raises(ModelError) as caught:
        add_lora(model, LoraSpec(target_modules=["v_proj", target]), seed=0)
    assert caught.value.code == "HB320"
    assert repr(target) in caught.value.what
    assert "v_proj" not in caught.value.what
    assert near in caught.value.fix
    assert "down_proj" in caught.value.fix
    assert not adapted_modules(model)


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(ModelError) as caught:
        LoraSpec(r=0, alpha=float("nan"), dropout=1.0, target_modules="q_proj")  # type: ignore[arg-type]
    assert caught.value.code == "HB321"
    assert all(name in caught.value.what for name in ("r is 0", "alpha", "dropout", "target_modules"))


def test_no_targets_at_all_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="HB321"):
        add_lora(model, LoraSpec(target_modules=[]), seed=0)


def test_a_second_set_of_adapters_is_refused(model: PreTrainedModel) -> None:
    add_lora(model, LoraSpec(2), seed=0)
    with pytest.raises(ModelError, match="HB322"):
        add_lora(model, LoraSpec(2), seed=0)


def test_the_base_answers_alone_while_adapters_are_off(model: PreTrainedModel) -> None:
    base = logits(model)
    add_lora(model, LoraSpec(2), seed=0)
    randomise(model)
    adapted = logits(model)
    assert not torch.equal(adapted, base)
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
        with adapters_disabled(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)


def test_adapters_are_on_again_after_an_error(model: PreTrainedModel) -> None:
    add_lora(model, LoraSpec(2), seed=0)
    with pytest.raises(RuntimeError, match="planted"), adapters_disabled(model):
        raise RuntimeError("planted")
    assert all(layer.enabled for layer in adapted_modules(model).values())


def test_switching_off_adapters_that_are_not_there_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="HB322"), adapters_disabled(model):
        pytest.fail("the base would have been compared with itself")


def test_dropout_acts_in_training_alone_and_on_the_branch_alone() -> None:
    base, _, _ = dense("linear")
    layer = LoraLinear(base, LoraSpec(R, dropout=0.5), torch.Generator().manual_seed(0))
    layer.lora_B.data.fill_(1)
    x = torch.ones(64, K)
    plain = base(x)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_B.data.zero_()
    # K products of float32 in another order: each rounds by 2^-24 of a partial sum.
    torch.testing.assert_close(layer(x), plain, atol=K * 2.0**-24 * float(plain.abs().max()), rtol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_branch_is_computed_in_the_inputs_dtype_and_kept_in_float32(
    stories: Path, dtype: torch.dtype
) -> None:
    model = load(stories, quantization=QuantSpec(), dtype=dtype)
    add_lora(model, LoraSpec(2), seed=0)
    model(tokens(model), labels=tokens(model)).loss.backward()
    for parameter in trainable_parameters(model):
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    assert logits(model).dtype == dtype
