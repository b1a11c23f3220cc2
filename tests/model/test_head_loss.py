"""Promises of the loss without logits: the model's own loss and gradients, whatever its head is and does after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from halfbyte.data.pack import UNTRAINED
from halfbyte.kernels import ops
from halfbyte.model import heads
from halfbyte.model.heads import Objective, head_route, trained_loss, trained_token_losses
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, adapted_modules, add_lora

V = 61
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **ATTENTION, head_dim=8),
    "gemma2, whose logits are capped": Gemma2Config(
        **SIZES, **ATTENTION, head_dim=8, final_logit_softcapping=2.0
    ),
    "gpt2, tied": GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "cohere, whose logits are multiplied": CohereConfig(**SIZES, **ATTENTION, logit_scale=0.3),
    "granite, whose logits are divided": GraniteConfig(**SIZES, **ATTENTION, logits_scaling=4.0),
    "phi, whose head has a bias": PhiConfig(**SIZES, **ATTENTION),
    "gptj, whose head has a bias": GPTJConfig(vocab_size=V, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}

# Logits below 10 are products of 32 float32 terms: off by 32 x 2^-24 of that, in two orders; times 10 for the layers.
LOSS_TOLERANCE = 10 * 2 * 320 * 2.0**-24
# A gradient entry is a sum over 10 tokens of terms that each went through ~10 such products; as a share of the
# largest entry of its parameter.
GRADIENT_TOLERANCE = 10 * 320 * 2.0**-24


def built(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, mask and labels (3, 9) of rows of 9, 5 and 7 tokens with 5, 4 and 1 that are trained."""
    input_ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones(3, 9, dtype=torch.long), torch.full((3, 9), UNTRAINED)
    for row, (begin, end) in enumerate([(4, 9), (0, 5), (6, 7)]):
        labels[row, begin:end] = input_ids[row, begin:end]
        mask[row, end:] = 0
    return input_ids, mask, labels


def given() -> tuple[dict[str, Any], Tensor]:
    """The same as what a model is called with, and labels."""
    input_ids, mask, labels = rows()
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}, labels


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Those of parameters that the loss depends on; a key's bias shifts all scores of a query alike, so not on it."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {name: gradient for name, gradient in found.items() if not name.endswith("k_proj.bias")}


def assert_same(model: PreTrainedModel, ours: Tensor, theirs: Tensor, loosen: float = 1.0) -> None:
    assert abs(ours.item() - theirs.item()) <= LOSS_TOLERANCE * loosen
    got, expected = gradients(model, ours), gradients(model, theirs)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        off = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert off <= GRADIENT_TOLERANCE * loosen, f"{name}: {off:.3g}"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_are_the_model_s_own(config: PretrainedConfig) -> None:
    model = built(config)
    input_ids, mask, labels = rows()
    theirs = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    ours = trained_loss(model, *given(), divisor=10)
    assert head_route(model).way == "dense"
    assert ours.objective == ours.cross_entropy
    assert_same(model, ours.objective, theirs)
    with torch.no_grad():
        nll = trained_token_losses(model, *given())
    assert nll.shape == (10,)
    assert abs(nll.mean().item() - theirs.item()) <= LOSS_TOLERANCE


@pytest.mark.parametrize("frozen", [True, False], ids=["head frozen", "head trained"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_of_tokens_carry_their_gradients(config: PretrainedConfig, frozen: bool) -> None:
    model = built(config)
    model.get_output_embeddings().requires_grad_(not frozen)
    input_ids, mask, labels = rows()
    logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
    chosen = labels[:, 1:] != UNTRAINED
    theirs = torch.nn.functional.cross_entropy(logits[chosen], labels[:, 1:][chosen], reduction="none")
    weights = torch.linspace(-1.0, 2.0, 10)  # as of a preference: some tokens to be likelier, some less
    ours = trained_token_losses(model, *given())
    assert_same(model, (ours * weights).sum(), (theirs * weights).sum(), loosen=10)


def test_the_head_has_nothing_to_multiply() -> None:
    model = built(CONFIGS["llama"])
    seen: list[int] = []
    forward = nn.Linear.forward

    def counting(self: nn.Linear, x: Tensor) -> Tensor:
        if self is model.lm_head:
            seen.append(x.numel())
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counting)
        trained_loss(model, *given(), divisor=10)
    assert seen == [0]


@pytest.mark.parametrize("forgotten", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_what_a_model_does_to_its_logits_is_seen_when_its_configuration_does_not_tell(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a name that is not known here. The model's own logits are used instead."""
    for names in ("CAPS", "FACTORS", "DIVISORS"):
        monkeypatch.setattr(heads, names, tuple(name for name in getattr(heads, names) if name != forgotten))
    (config,) = (each for name, each in CONFIGS.items() if each.to_dict().get(forgotten) not in (None, 1.0))
    model = built(config)
    input_ids, mask, labels = rows()
    assert head_route(model).way == "dense"
    theirs = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    assert_same(
        model,
        trained_loss(model, *given(), divisor=10).objective,
        theirs,
    )
    assert head_route(model) == ("logits", f"{type(model).__name__} does something unknown to its logits")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    trained_loss(model, *given(), divisor=10)
    assert len(calls) == 1, "from the second time on the model runs once"


def test_a_model_that_multiplies_with_its_head_s_weight_by_itself_gives_the_same_loss() -> None:
    model = built(CONFIGS["llama"])
    input_ids, mask, labels = rows()
    theirs = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    head, model.lm_head = model.lm_head, nn.Identity()
    inner = model.forward

    def forward(**inputs: Tensor) -> object:
        out = inner(**inputs)
        out.logits = out.logits @ head.weight.T
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", forward)
        patch.setattr(model, "get_output_embeddings", lambda: head)
        ours = trained_loss(model, *given(), divisor=10)
        assert head_route(model) == ("logits", "LlamaForCausalLM does not call its head")
    assert abs(ours.objective.item() - theirs.item()) <= LOSS_TOLERANCE


def quantised(model: PreTrainedModel) -> None:
    model.lm_head = Linear4bit(ops.quantize_4bit(model.lm_head.weight))


def adapted(model: PreTrainedModel) -> None:
    add_lora(model, LoraSpec(r=4, target_modules=["lm_head", "q_proj"]), seed=0)
    for layer in adapted_modules(model).values():
        nn.init.normal_(layer.lora_B)


def hooked(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: out * 2)


@pytest.mark.parametrize(
    ("change", "why"),
    [(quantised, "a Linear4bit, not"), (adapted, "a LoraLinear, not"), (hooked, "the head has hooks")],
)
def test_other_heads_go_through_their_logits(change, why: str) -> None:
    model = built(CONFIGS["llama"])
    change(model)
    assert head_route(model).way == "logits"
    assert why in head_route(model).why
    input_ids, mask, labels = rows()
    theirs = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    ours = trained_loss(model, *given(), divisor=10)
    assert_same(model, ours.objective, theirs)
    nll = trained_token_losses(model, *given())
    assert abs(nll.mean().item() - theirs.item()) <= LOSS_TOLERANCE


def test_both_ways_minimise_the_same() -> None:
    model, other = built(CONFIGS["llama"]), built(CONFIGS["llama"])
    other.lm_head.register_forward_hook(lambda *_: None)
    objective = Objective(label_smoothing=0.2, z_loss=0.01)
    dense = trained_loss(model, *given(), divisor=10, objective=objective)
    logits = trained_loss(other, *given(), divisor=10, objective=objective)
    assert (head_route(model).way, head_route(other).way) == ("dense", "logits")
    assert dense.objective.item() == pytest.approx(logits.objective.item(), abs=LOSS_TOLERANCE)
    assert dense.cross_entropy.item() == pytest.approx(logits.cross_entropy.item(), abs=LOSS_TOLERANCE)
    plain = trained_loss(model, *given(), divisor=10).objective.item()
    assert dense.cross_entropy.item() == pytest.approx(plain, abs=LOSS_TOLERANCE)
    assert dense.objective.item() > plain + 0.01
    expected = gradients(other, logits.objective)
    for name, gradient in gradients(model, dense.objective).items():
        off = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert off <= GRADIENT_TOLERANCE, name


def test_full_training_in_16_bits_keeps_its_head_s_gradient_in_32() -> None:
    model = built(CONFIGS["gpt2, tied"])
    input_ids, mask, labels = rows()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        ours = trained_loss(model, *given(), divisor=10).objective
    # Logits below 10, rounded to 8 bits at different places of the same computation.
    assert abs(ours.item() - theirs.item()) <= 2 * 10 * 2.0**-8
    got, expected = gradients(model, ours), gradients(model, theirs)
    assert got["transformer.wte.weight"].dtype == torch.float32
    for name, gradient in expected.items():
        if not name.endswith(
            "attn.c_attn.bias"
        ):  # a third of it is the keys' bias, whose gradient is rounding
            assert (got[name] - gradient).norm() <= 8 * 2.0**-8 * gradient.norm(), name


def test_model_is_left_without_hooks_even_after_an_error() -> None:
    model = built(CONFIGS["llama"])
    input_ids, mask, labels = rows()
    with pytest.raises(IndexError):
        trained_loss(model, {"input_ids": input_ids + V, "attention_mask": mask}, labels, divisor=10)
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks
    assert model(input_ids=input_ids).logits.shape == (3, 9, V)


def adapted(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The same adapters on a model in any dtype."""
    model = load(folder, quantization=None, dtype=dtype)
    add_lora(model, LoraSpec(r=4), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(len(name)))
    return model


def distance(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """How far gradients are from others, relative to those, over all parameters."""
    off = sum(float((got[name].float() - gradient).square().sum()) for name, gradient in exact.items())
    return (off / sum(float(gradient.square().sum()) for gradient in exact.values())) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_model_s_loss_and_lora_gradients_are_its_own(shared, dtype: torch.dtype) -> None:
    folder: Path = shared("models/base-11m")
    model, wide = adapted(folder, dtype), adapted(folder, torch.float32)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(10, model.config.vocab_size, (3, 65), generator=generator)
    labels = input_ids.masked_fill(torch.arange(65) < 20, UNTRAINED)
    exact = gradients(wide, wide(input_ids=input_ids, labels=labels).loss)
    theirs = model(input_ids=input_ids, labels=labels).loss
    ours = trained_loss(model, {"input_ids": input_ids, "use_cache": False}, labels, divisor=3 * 45)
    assert head_route(model).way == "dense"
    assert abs(ours.objective.item() - theirs.item()) <= (
        LOSS_TOLERANCE if dtype is torch.float32 else 2.0**-8
    )
    got, expected = gradients(model, ours.objective), gradients(model, theirs)
    if dtype is torch.float32:
        for name, gradient in expected.items():
            off = (got[name] - gradient).norm() / gradient.norm()
            assert off <= 4 * GRADIENT_TOLERANCE, f"{name}: {off:.3g}"
    else:  # both are rounded at every step to 8 bits, the model's logits too: neither is the measure of the other
        assert distance(got, exact) <= 1.25 * distance(expected, exact)
    assert set(got) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
