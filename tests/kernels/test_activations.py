"""Activations and gated activations are right to their roundings, and their gradients to theirs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from halfbyte.errors import KernelError
from halfbyte.kernels import activations, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("silu", "gelu", "gelu_tanh", "relu")
WIDTHS = (1, 7, 31, 64, 65, 100, 5632)
UNIT = 2.0**-24
SPACING = (
    2.0**-149
)  # of subnormal numbers; whatever is computed from one is off by as much times what it is multiplied by
# Numbers from the tails, around the steep part, and where float16 overflows.
SPREAD = torch.cat(
    [torch.linspace(-20, 20, 401), torch.tensor([-200.0, -90.0, -1e-20, 0.0, 1e-20, 90.0, 6e4])]
)


def inner(x: torch.Tensor) -> torch.Tensor:
    """The argument of the sigmoid in gelu_tanh, and its slope."""
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


def act_error(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Error of act(x) before its rounding: native/vector_math.hpp's bounds and the product with x."""
    exact = reference.activation_forward(x, kind).abs()
    if kind == "relu":
        return torch.zeros_like(exact)
    if kind == "silu":
        return 5 * UNIT * exact + SPACING * x.abs()
    if kind == "gelu":
        return (11 + x * x) * UNIT * exact + SPACING * x.abs()
    # The argument is rounded six times; where the sigmoid is small, that is relative to the argument.
    return (5 + 6 * inner(x).abs()) * UNIT * exact + SPACING * x.abs()


def slope_error(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Error of act'(x): each term's, as `act_error`; the sum of terms may be smaller than they are."""
    x = x.clamp(-128, 128)
    if kind == "relu":
        return torch.zeros_like(x)
    if kind == "gelu":
        bell = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        return (12 + x * x) * UNIT * (below + x.abs() * bell) + SPACING * (1 + x.abs())
    argument = x if kind == "silu" else inner(x)
    steepness = torch.ones_like(x) if kind == "silu" else math.sqrt(8 / math.pi) * (1 + 0.134145 * x * x)
    s, rest = torch.sigmoid(argument), torch.sigmoid(-argument)
    terms = s + x.abs() * s * rest * steepness
    # 1 - s keeps an absolute error of 4 u, but never more than twice itself.
    cancelled = x.abs() * s * steepness * torch.minimum(torch.full_like(x, 4 * UNIT), 2 * rest)
    subnormal = SPACING * (1 + x.abs() * steepness)
    return (12 + 8 * argument.abs()) * UNIT * terms + cancelled + subnormal


def gates(D: int, dtype: torch.dtype, numbers) -> tuple[torch.Tensor, ...]:
    """dh, gate and up (5, D), the gate wide enough for the tails."""
    return tuple(
        numbers(5, D, dtype=dtype, seed=seed, scale=scale) for seed, scale in ((0, 1), (1, 4), (2, 2))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_right_to_one_rounding(isa, kind, dtype, assert_rounded):
    x = SPREAD.to(dtype)
    exact = reference.activation_forward(x.double(), kind)
    assert_rounded(activations.activation_forward(x, kind), exact, act_error(x.double(), kind))
    dy = torch.linspace(-2, 2, len(x)).to(dtype)
    exact = reference.activation_backward(dy.double(), x.double(), kind)
    error = dy.double().abs() * slope_error(x.double(), kind) + 2 * UNIT * exact.abs()
    assert_rounded(activations.activation_backward(dy, x, kind), exact, error)


def test_the_bound_notices_the_other_gelu_and_a_flushed_tail(assert_rounded):
    x = SPREAD.bfloat16()
    exact, error = reference.activation_forward(x.double(), "gelu"), act_error(x.double(), "gelu")
    assert_rounded(reference.activation_forward(x, "gelu"), exact, error)
    with pytest.raises(AssertionError, match="outside"):
        assert_rounded(reference.activation_forward(x, "gelu_tanh"), exact, error)
    flushed = torch.where(x < -9, torch.zeros_like(x), reference.activation_forward(x, "gelu"))
    with pytest.raises(AssertionError, match="outside"):
        assert_rounded(flushed, exact, error)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_torch_s_function_and_derivative(kind):
    x = SPREAD.double().clamp(-30, 30).requires_grad_()
    theirs = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}.get(kind) or getattr(F, kind)
    expected = theirs(x)
    # torch's gelu cancels in the tail: a unit of 1, not of the result.
    torch.testing.assert_close(reference.activation_forward(x, kind), expected, rtol=1e-14, atol=1e-14)
    dy = torch.ones_like(x)
    (dx,) = torch.autograd.grad(expected, x, dy)
    torch.testing.assert_close(reference.activation_backward(dy, x, kind), dx, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_names_mean_transformers_functions(backend, name, dtype):
    x = SPREAD.clamp(-20, 20).to(dtype)
    expected = ACT2FN[name](x)
    # Theirs: 1 + tanh and 1 + erf cancel, which costs units of x; gelu_new rounds each of eight steps to the dtype.
    rounding = {torch.float32: UNIT, torch.bfloat16: 2.0**-8}[dtype]
    steps = 8 if name == "gelu_new" else 1.01
    atol = 8 * (rounding if name == "gelu_new" else UNIT) * x.double().abs()
    off = (activations.activation_forward(x, name).double() - expected.double()).abs()
    assert (off <= 2 * steps * rounding * expected.double().abs() + 20 * UNIT * x.double().abs() + atol).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", WIDTHS)
def test_gated_is_right_to_its_two_roundings(isa, D, kind, dtype, numbers, assert_product_of_rounded):
    _, gate, up = gates(D, dtype, numbers)
    exact = reference.activation_forward(gate.double(), kind)
    error = act_error(gate.double(), kind)
    assert_product_of_rounded(activations.gated_forward(gate, up, kind), exact, error, up, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", WIDTHS)
def test_gated_gradients_are_right_to_their_roundings(
    isa, D, kind, dtype, numbers, assert_rounded, assert_product_of_rounded
):
    dh, gate, up = gates(D, dtype, numbers)
    dgate, dup, h = activations.gated_backward(dh, gate, up, kind, recompute_h=True)
    wide = [t.double() for t in (dh, gate, up)]
    exact, _, _ = reference.gated_backward(*wide, kind, False)
    back = (wide[0] * wide[2]).abs()
    assert_rounded(dgate, exact, back * slope_error(wide[1], kind) + 3 * UNIT * exact.abs())
    act = reference.activation_forward(wide[1], kind)
    assert_product_of_rounded(dup, act, act_error(wide[1], kind), dh, dtype)
    assert torch.equal(h, activations.gated_forward(gate, up, kind))


def test_silu_gates_equal_transformers_to_the_bit_where_rounding_is_unambiguous(isa, numbers):
    _, gate, up = gates(5632, torch.bfloat16, numbers)
    exact = F.silu(gate.double())
    # Both round the same number, known to 5 u here and 8 u there.
    same = (exact * (1 - 8 * UNIT)).bfloat16() == (exact * (1 + 8 * UNIT)).bfloat16()
    assert same.float().mean() > 0.99
    assert torch.equal(activations.gated_forward(gate, up, "silu")[same], (F.silu(gate) * up)[same])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [33, 600])
def test_halves_of_one_tensor_are_read_and_overwritten_where_they_lie(backend, width, kind, dtype, numbers):
    fused = numbers(3, 7, 2 * width, dtype=dtype, scale=3)
    gate, up = fused.chunk(2, dim=-1)
    dh = numbers(3, 7, width, dtype=dtype, seed=1)
    apart = gate.contiguous(), up.contiguous()
    h = activations.gated_forward(*apart, kind)
    assert torch.equal(activations.gated_forward(gate, up, kind), h)
    dgate, dup, none = activations.gated_backward(dh, *apart, kind)
    assert none is None
    assert torch.equal(apart[0], gate), "only inplace may write"
    got = activations.gated_backward(dh, gate, up, kind, recompute_h=True, inplace=True)
    assert got[0] is gate
    assert got[1] is up
    assert torch.equal(fused, torch.cat([dgate, dup], dim=-1))
    assert torch.equal(got[2], h)


def test_rows_that_three_strides_do_not_reach_are_computed_all_the_same(backend, numbers):
    shape = (2, 3, 2, 3, 9)
    gate, up = (numbers(4, 6, 4, 6, 9, seed=seed)[::2, ::2, ::2, ::2] for seed in (0, 1))
    dh = numbers(*shape, seed=2)
    assert gate.shape == shape
    expected = activations.gated_backward(dh, gate.contiguous(), up.contiguous(), "silu", recompute_h=True)
    h = activations.gated_forward(gate, up, "silu")
    got = activations.gated_backward(dh, gate, up, "silu", recompute_h=True, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch.equal(got[2], h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_give_the_limit_and_nan_stays(backend, kind, dtype):
    # More than a vector of every width, so that both whole vectors and what is left over are seen.
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0]).repeat(33).to(dtype)
    y = activations.activation_forward(x, kind).reshape(-1, 4)
    assert (y[:, 0] == float("inf")).all()
    assert (y[:, 1] == 0).all()
    assert y[:, 2].isnan().all()
    slope = activations.activation_backward(torch.ones_like(x), x, kind).reshape(-1, 4)
    assert (slope[:, 0] == 1).all()
    assert (slope[:, 1] == 0).all()
    assert slope[:, 2].isnan().all()
    up = torch.full_like(x, float("nan"))
    assert activations.gated_forward(x, up, kind).isnan().all()


def test_gradients_by_difference_quotients_in_float64(numbers):
    # Away from relu's corner by more than gradcheck's step.
    gate = numbers(3, 7, dtype=torch.float64, scale=2)
    gate = torch.where(gate.abs() < 0.01, gate + 0.1, gate).requires_grad_()
    up = numbers(3, 7, dtype=torch.float64, seed=1).requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda g, u, k=kind: activations.gated(g, u, k), (gate, up))
        assert torch.autograd.gradcheck(lambda x, k=kind: activations.activation(x, k), (gate,))


def test_gradcheck_notices_swapped_gradients(monkeypatch, numbers):
    def swapped(dh, gate, up, kind):
        dgate, dup, h = reference.gated_backward(dh, gate, up, kind, False)
        return dup, dgate, h

    monkeypatch.setattr(activations, "gated_backward", swapped)
    gate, up = (numbers(3, 7, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda g, u: activations.gated(g, u, "silu"), (gate, up))


def test_nothing_but_its_arguments_is_saved(numbers):
    gate, up = (numbers(3, 100, seed=seed).requires_grad_() for seed in (0, 1))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        activations.gated(gate, up, "silu")
    assert set(saved) == {gate.data_ptr(), up.data_ptr()}


def test_a_saved_tensor_that_was_overwritten_is_noticed(backend, numbers):
    gate, up = (numbers(3, 100, seed=seed).requires_grad_() for seed in (0, 1))
    g, u = gate * 1, up * 1
    h = activations.gated(g, u, "silu")
    activations.gated_backward(torch.ones_like(h), g.detach(), u.detach(), "silu", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_unfit_arguments_are_refused(numbers):
    x = numbers(2, 5)
    with pytest.raises(KernelError, match="HB402.*kind is 'sigmoid', expected one of silu"):
        activations.gated_forward(x, x, "sigmoid")
    with pytest.raises(KernelError, match="HB402.*x is torch.int64"):
        activations.activation_forward(x.long(), "silu")
    with pytest.raises(KernelError, match="HB402.*dy is"):
        activations.activation_backward(x[:1], x, "silu")
    with pytest.raises(KernelError, match="HB402.*up is torch.bfloat16"):
        activations.gated_forward(x, x.bfloat16(), "silu")
    with pytest.raises(KernelError, match="HB402.*dh is"):
        activations.gated_backward(x[:, :4], x, x, "silu")
    with pytest.raises(KernelError, match="HB402.*on meta, expected.*on cpu"):
        activations.gated_forward(x, x.to("meta"), "silu")
