"""Rows of logits become losses and gradients on every instruction set as in float64, to derived bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import backends, cpu, reference
from halfbyte.kernels.loss_terms import Gradient, LossTerms, place_of_gradient
from halfbyte.kernels.native import module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the tile of 256 numbers and its 16 lanes, and a vocabulary that nothing divides.
VOCABULARIES = (1, 2, 15, 16, 17, 255, 256, 257, 1003)
TERMS = {
    "plain": LossTerms(),
    "smoothed": LossTerms(label_smoothing=0.1),
    "z-loss": LossTerms(z_loss=0.01),
    "capped": LossTerms(softcap=7.0),
    "scaled": LossTerms(logit_scale=-0.3),
    "all": LossTerms(0.2, 0.003, 5.0, 0.7),
}
FACTOR = 1 / 37

ULP = 2.0**-24
# One rounding of the gradient to its dtype, relative, and the spacing below the smallest normal number, halved.
ROUNDING = {torch.float32: ULP, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
# A bent logit: sum with the bias, product with the scale, quotient, tanh (8 ulp of 2^-24), product: each relative.
BENT = 12 * ULP
# An exponential: 4 ulp of 2^-24; the sum of a tile: 16 terms in a lane and 4 foldings; the tiles in double.
EXPONENTIALS = (4 + 20) * ULP
# Exponentials below the smallest normal number are spaced 2^-149 apart, and so are their products.
VANISHED = 2.0**-148

Inputs = tuple[Tensor, Tensor, Tensor | None, LossTerms]
LossRows = Callable[..., tuple[Tensor, Tensor]]


def rows(R: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (R, V) from tame to far apart, targets (R,), bias (V,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(R, V, generator=generator) * torch.logspace(-1, 1.3, R)[:, None]
    return logits, torch.randint(0, V, (R,), generator=generator), torch.randn(V, generator=generator)


class Exact:
    """Losses and gradients in float64 by autograd, and how far float32 may be from them."""

    def __init__(self, logits: Tensor, targets: Tensor, bias: Tensor | None, terms: LossTerms) -> None:
        x = logits.double().requires_grad_()
        added = x if bias is None else x + bias.double()
        z = added * terms.logit_scale
        if terms.softcap:
            z = terms.softcap * torch.tanh(z / terms.softcap)
        self.nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
        lse = torch.logsumexp(z, dim=1)
        smoothed = torch.nn.functional.cross_entropy(
            z, targets, reduction="none", label_smoothing=terms.label_smoothing
        )
        self.objective = smoothed + terms.z_loss * lse.square()
        (self.gradient,) = torch.autograd.grad(self.objective.sum() * FACTOR, x)
        with torch.no_grad():
            magnitude = (x.abs() + (0 if bias is None else bias.double().abs())).amax(1)
            bent = bias is not None or terms.softcap or terms.logit_scale != 1
            moved = (BENT if bent else 0.0) * magnitude * abs(terms.logit_scale)
            # The difference to the largest logit is rounded before it is exponentiated.
            p_error = 2 * moved + (z.amax(1) - z.amin(1)) * ULP + EXPONENTIALS  # relative
            self.nll_bound = p_error + 2 * moved + ULP
            slope = 1 + 2 * terms.z_loss * lse.abs()
            self.objective_bound = self.nll_bound * slope + self.objective.abs() * 2.0**-50
            common = FACTOR * abs(terms.logit_scale)
            p = torch.softmax(z, dim=1) * slope[:, None]
            others = terms.label_smoothing / z.shape[1] + torch.nn.functional.one_hot(targets, z.shape[1])
            # Through the bending times 1 - (z / cap)², whose own error is absolute.
            steep = 2 * (moved[:, None] / terms.softcap + 4 * ULP) if terms.softcap else 0.0
            self.gradient_bound = common * (
                p * (2 * p_error[:, None] + 4 * ULP)
                + slope[:, None] * VANISHED
                + 4 * ULP * others
                + (p + others) * steep
            )

    def check(self, nll: Tensor, objective: Tensor, gradient: Tensor | None = None) -> None:
        assert nll.dtype == objective.dtype == torch.float64
        assert ((nll - self.nll).abs() <= self.nll_bound).all(), (nll - self.nll).abs() / self.nll_bound
        assert ((objective - self.objective).abs() <= self.objective_bound).all()
        if gradient is not None:
            dtype = gradient.dtype
            bound = self.gradient_bound + self.gradient.abs() * 1.01 * ROUNDING[dtype] + SUBNORMAL[dtype]
            excess = (gradient.double() - self.gradient).abs() / bound
            assert (excess <= 1).all(), f"off by {excess.max():.3g} times the bound"


def computed(compute: LossRows, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    place = inputs[0].clone()
    nll, objective = compute(place, *inputs[1:], Gradient(dtype, FACTOR))
    return nll, objective, place_of_gradient(place, dtype).clone()


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_are_right_to_rounding(
    backend: str, dtype: torch.dtype, terms: LossTerms
) -> None:
    compute = backends.implementation("loss_rows", dtype)
    for V in VOCABULARIES:
        logits, targets, bias = rows(9, V, seed=V)
        for added in (None, bias):
            inputs = (logits, targets, added, terms)
            exact = Exact(*inputs)
            exact.check(*computed(compute, inputs, dtype))
            exact.check(*compute(logits.clone(), *inputs[1:], None))


def wrong_factor(*inputs: Any) -> tuple[Tensor, Tensor]:
    *inputs, gradient = inputs
    return reference.loss_rows(*inputs, gradient._replace(factor=gradient.factor * (1 + 1e-4)))


def gradient_of(**wrong: float) -> LossRows:
    """The right loss with the gradient of other terms."""

    def compute(logits: Tensor, targets: Tensor, bias: Tensor, terms: LossTerms, gradient: Gradient) -> Any:
        found = reference.loss_rows(logits.clone(), targets, bias, terms, None)
        reference.loss_rows(logits, targets, bias, terms._replace(**wrong), gradient)
        return found

    return compute


def probability_rounded_first(
    logits: Tensor, targets: Tensor, bias: Tensor, terms: LossTerms, gradient: Gradient
) -> tuple[Tensor, Tensor]:
    """p in 16 bits, then p - 1: where the model is sure, nothing is left."""
    found = reference.loss_rows(logits.clone(), targets, bias, terms, None)
    p = torch.softmax(logits, dim=1).to(gradient.dtype).float()
    p[torch.arange(len(p)), targets] -= 1
    place_of_gradient(logits, gradient.dtype).copy_(p * gradient.factor)
    return found


@pytest.mark.parametrize(
    ("bug", "terms", "dtype"),
    [
        (wrong_factor, "plain", torch.float32),
        (gradient_of(z_loss=0.0), "z-loss", torch.float32),
        (gradient_of(softcap=0.0), "capped", torch.float32),
        (gradient_of(label_smoothing=0.0), "smoothed", torch.float32),
        (gradient_of(logit_scale=0.3), "scaled", torch.float32),
        (probability_rounded_first, "plain", torch.bfloat16),
    ],
)
def test_planted_bugs_are_seen(bug: LossRows, terms: str, dtype: torch.dtype) -> None:
    logits, targets, _ = rows(9, 257)
    logits[3, targets[3]] = logits[3].max() + 9  # sure of its target
    inputs = (logits, targets, None, TERMS[terms])
    exact = Exact(*inputs)
    exact.check(*computed(reference.loss_rows, inputs, dtype))
    with pytest.raises(AssertionError, match="times the bound"):
        exact.check(*computed(bug, inputs, dtype))


def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    """Nothing in the kernels is fused and the order of sums is written out: the portable version decides."""
    native = module()
    assert native is not None
    for dtype in DTYPES:
        for terms in TERMS.values():
            logits, targets, bias = rows(7, 1003)
            found = computed(cpu.loss_rows, (logits, targets, bias, terms), dtype)
            native.use("portable")
            expected = computed(cpu.loss_rows, (logits, targets, bias, terms), dtype)
            native.use(isa)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    logits, targets, bias = rows(23, 513)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(computed(cpu.loss_rows, (logits, targets, bias, TERMS["all"]), torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_logit_makes_its_row_s_loss_nan_and_no_other_s(backend: str, bad: float) -> None:
    logits, targets, _ = rows(5, 300)
    for place in (0, 17, 299):
        poisoned = logits.clone()
        poisoned[2, place] = bad
        compute = backends.implementation("loss_rows", torch.float32)
        nll, objective = compute(poisoned, targets, None, LossTerms(), Gradient(torch.float32, FACTOR))
        assert nll.isnan().tolist() == objective.isnan().tolist() == [i == 2 for i in range(5)]
        gradient = place_of_gradient(poisoned, torch.float32)
        assert gradient[2].isnan().any()
        assert torch.isfinite(gradient[[0, 1, 3, 4]]).all()


def test_tokens_ruled_out_by_minus_infinity_have_no_probability(backend: str) -> None:
    logits, targets, _ = rows(4, 300)
    targets[:] = torch.tensor([0, 5, 8, 299])
    ruled_out = torch.arange(300) % 7 == 3
    logits[:, ruled_out] = -math.inf
    compute = backends.implementation("loss_rows", torch.float32)
    nll, _ = compute(logits.clone(), targets, None, LossTerms(), Gradient(torch.float32, FACTOR))
    *_, gradient = computed(compute, (logits, targets, None, LossTerms()), torch.float32)
    kept = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    # The kept logits alone: range at most 2 x 20 x 4 standard deviations.
    torch.testing.assert_close(nll, kept, rtol=0.0, atol=160 * ULP + EXPONENTIALS)
    assert (gradient[:, ruled_out] == 0).all()


def test_logits_far_from_zero_neither_overflow_nor_vanish(backend: str) -> None:
    compute = backends.implementation("loss_rows", torch.float32)
    logits, targets, _ = rows(4, 64)
    for shift in (-3.0e4, 3.0e4, 1.0e30):
        shifted = logits + shift
        inputs = (shifted, targets, None, LossTerms())
        Exact(*inputs).check(*computed(compute, inputs, torch.float32))
