"""Promises of the optimizer: AdamW's arithmetic, what is decayed, what is refused, clipping."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import TrainError
from halfbyte.settings import TrainConfig
from halfbyte.train.optimizer import build_optimizer, clip_gradients, set_learning_rate, trainable_parameters

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
        expected = before[name].double() * (1 - 0.1 * decay) - 0.1 * g / (g.abs() + config.eps)
        assert (parameter.double() - expected).abs().max() <= FLOAT32_TOLERANCE
    assert len(gradients) == 2


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(_layer(), TrainConfig())
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
