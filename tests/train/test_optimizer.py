"""Promises of the optimizer: AdamW's arithmetic, what is decayed, what is refused, clipping."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel

from halfbyte.errors import TrainError
from halfbyte.model.lora import LoraSpec, add_lora
from halfbyte.settings import TrainConfig
from halfbyte.train.lion import Lion
from halfbyte.train.optimizer import (
    OPTIMIZERS,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
    trainable_parameters,
)

# About ten float32 operations on numbers of size 1, each off by at most half a unit in the last place.
FLOAT32_TOLERANCE = 16 * 2.0**-24


def _layer(seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(5, 3)


def test_first_step_is_adamw_by_its_closed_form() -> None:
    layer = _layer()
    config = TrainConfig(learning_rate=0.1, weight_decay=0.25)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = build_optimizer(layer, config)
    layer(torch.ones(2, 5)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, parameter in layer.named_parameters():
        decay = 0.25 if name == "weight" else 0.0
        # With zero moments the bias corrections cancel the betas: the first step is lr * g / (|g| + eps).
        g = gradients[name].double()
        expected = before[name].double() * (1 - 0.1 * decay) - 0.1 * g / (g.abs() + 1e-8)
        assert (parameter.double() - expected).abs().max() <= FLOAT32_TOLERANCE
    assert len(gradients) == 2


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(_layer(), TrainConfig(weight_decay=0.1))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_frozen_parameters_are_left_out() -> None:
    layer = _layer()
    layer.bias.requires_grad_(False)
    assert list(trainable_parameters(layer)) == ["weight"]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    layer = _layer()
    layer.requires_grad_(False)
    with pytest.raises(TrainError, match="HB505"):
        build_optimizer(layer, TrainConfig())


def test_parameters_below_float32_are_refused_by_name() -> None:
    with pytest.raises(TrainError, match=r"weight \(torch.bfloat16\)"):
        build_optimizer(_layer().to(torch.bfloat16), TrainConfig())


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_bounds_the_global_norm_and_tells_the_old_one(max_norm: float | None) -> None:
    layer = _layer()
    optimizer = build_optimizer(layer, TrainConfig())
    layer(torch.ones(2, 5)).square().sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    old = torch.cat([g.flatten() for g in gradients]).double()
    norm = clip_gradients(optimizer, max_norm)
    new = torch.cat([g.flatten() for g in gradients]).double()
    assert abs(norm - float(old.norm())) <= FLOAT32_TOLERANCE * float(old.norm())
    scale = 1.0 if max_norm is None or norm <= max_norm else max_norm / norm
    assert (new - old * scale).abs().max() <= FLOAT32_TOLERANCE * float(old.norm())
    assert norm > 0.5


def test_a_gradient_that_is_not_finite_is_told_not_scaled() -> None:
    layer = _layer()
    optimizer = build_optimizer(layer, TrainConfig())
    layer(torch.ones(2, 5)).sum().backward()
    assert layer.bias.grad is not None
    layer.bias.grad[1] = float("inf")
    weight_grad = layer.weight.grad.clone() if layer.weight.grad is not None else None
    assert clip_gradients(optimizer, 1.0) == float("inf")
    assert torch.equal(layer.weight.grad, weight_grad)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8}),
        ("adafactor", torch.optim.Adafactor, {}),
        ("sgd", torch.optim.SGD, {}),
    ],
)
def test_an_optimizer_of_a_name_is_torchs_with_its_defaults(
    name: str, theirs: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    layer, other = _layer(), _layer()
    config = TrainConfig.model_validate({"optimizer": name, "learning_rate": 0.05, "weight_decay": 0.125})
    ours = build_optimizer(layer, config)
    assert type(ours) is theirs
    groups = [
        {"params": [other.weight], "weight_decay": 0.125},
        {"params": [other.bias], "weight_decay": 0.0},
    ]
    expected = theirs(groups, lr=0.05, **options)
    for optimizer, model in ((ours, layer), (expected, other)):
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
    assert (layer.weight - other.weight).abs().max() <= FLOAT32_TOLERANCE
    assert (layer.bias - other.bias).abs().max() <= FLOAT32_TOLERANCE
    assert (layer.weight - _layer().weight).abs().max() > 100 * FLOAT32_TOLERANCE


def test_lion_steps_as_its_paper_says() -> None:
    layer = _layer()
    lr, decay, beta1, beta2 = 0.01, 0.5, 0.8, 0.95
    given = TrainConfig(optimizer="lion", learning_rate=lr, weight_decay=decay, beta1=beta1, beta2=beta2)
    optimizer = build_optimizer(layer, given)
    assert type(optimizer) is Lion
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    averages = {name: torch.zeros_like(w) for name, w in weights.items()}
    disagreed = 0
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        layer(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            g = parameter.grad.double()
            update = torch.sign(beta1 * averages[name] + (1 - beta1) * g)
            shrink = decay if name == "weight" else 0.0
            weights[name] = weights[name] - lr * (update + shrink * weights[name])
            averages[name] = beta2 * averages[name] + (1 - beta2) * g
            disagreed += int((update != torch.sign(g)).sum())
            assert (parameter.double() - weights[name]).abs().max() <= FLOAT32_TOLERANCE
    assert disagreed > 0, "the average never decided, so a step without it would have passed"


def test_lion_skips_what_has_no_gradient_and_takes_up_its_state_again() -> None:
    layer = _layer()
    optimizer = build_optimizer(layer, TrainConfig(optimizer="lion", learning_rate=0.01))
    layer.weight.sum().backward()
    optimizer.step()
    assert torch.equal(layer.bias, _layer().bias)
    again = build_optimizer(layer, TrainConfig(optimizer="lion", learning_rate=0.01))
    again.load_state_dict(optimizer.state_dict())
    (average,) = [state["exp_avg"] for state in again.state.values()]
    assert torch.allclose(average, torch.full((3, 5), 0.01))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    layer = _layer()
    rate = {"adafactor": 0.3, "sgd": 0.05}.get(name, 0.02)
    config = TrainConfig.model_validate({"optimizer": name, "learning_rate": rate})
    optimizer = build_optimizer(layer, config)
    losses = []
    for _ in range(60):
        loss = (layer(torch.eye(5)) - 1.0).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("decay", "norm"), [(0.01, False), (0.0, True)]
)  # PEFT decays an RMSNorm, which ours is not
def test_lora_plus_has_the_groups_of_peft(
    tiny_llama: Callable[[], PreTrainedModel], decay: float, norm: bool
) -> None:
    targets = ["q_proj", "down_proj"]
    peft = get_peft_model(tiny_llama(), PeftLora(r=4, target_modules=targets))
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4, alpha=8, target_modules=targets), seed=0)
    peft.get_submodule("base_model.model.model.norm").requires_grad_(norm)
    model.get_submodule("model.norm").requires_grad_(norm)
    theirs = create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=decay
    )
    config = TrainConfig(learning_rate=1e-3, lora_plus_ratio=16.0, weight_decay=decay)
    ours = build_optimizer(model, config)
    assert _groups(ours, model) == _groups(theirs, peft)
    set_learning_rate(ours, 0.5)
    assert {rate for rate, _, _ in _groups(ours, model)} == {0.5, 8.0}


def test_lora_plus_with_a_ratio_of_one_is_lora(tiny_llama: Callable[[], PreTrainedModel]) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4, alpha=8, target_modules=["q_proj"]), seed=0)
    plain = _groups(build_optimizer(model, TrainConfig()), model)
    assert _groups(build_optimizer(model, TrainConfig(lora_plus_ratio=1.0)), model) == plain


def _groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> set[tuple[float, float, frozenset[str]]]:
    """Learning rate, weight decay and parameter names of each group that has any, PEFT's names as ours."""
    names = {
        id(p): name.removeprefix("base_model.model.").replace(".default.weight", "")
        for name, p in model.named_parameters()
    }
    return {
        (group["lr"], group["weight_decay"], frozenset(names[id(p)] for p in group["params"]))
        for group in optimizer.param_groups
        if group["params"]
    }
