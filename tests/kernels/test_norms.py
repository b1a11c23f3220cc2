"""RMSNorm and LayerNorm mean what transformers and torch mean, on every instruction set, to the rounding."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F

from halfbyte.errors import KernelError
from halfbyte.kernels import norms, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 31, 64, 65, 100, 5632)
EPS = 1e-6
UNIT = 2.0**-24


def sum_error(D: int) -> float:
    """Relative error of a sum of D positive terms in 32 partial sums: D / 32 + 1 additions and five folds, each of
    one rounding, and one of the term itself."""
    return (D / 32 + 7) * UNIT


def normalised_error(D: int) -> float:
    """Relative error of x · rstd: half of the sum's through the square root; mean, eps, root, inverse, product."""
    return sum_error(D) / 2 + 5 * UNIT


def exact_rms(x: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()


def check_llama(y, x, weight, assert_product_of_rounded) -> None:
    exact = exact_rms(x)
    error = normalised_error(x.shape[-1]) * exact.abs()
    assert_product_of_rounded(y, exact, error, weight.expand_as(x), x.dtype)


def check_gemma(y, x, weight, assert_rounded) -> None:
    exact = exact_rms(x) * (1 + weight.double())
    assert_rounded(y, exact, (normalised_error(x.shape[-1]) + 2 * UNIT) * exact.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_rms_norm_is_right_to_its_roundings(
    isa, D, dtype, numbers, assert_rounded, assert_product_of_rounded
):
    x, weight = numbers(3, 5, D, dtype=dtype, scale=3), numbers(D, dtype=dtype, seed=1)
    y, rstd = norms.rms_norm_forward(x, weight, EPS)
    assert rstd.shape == (3, 5)
    check_llama(y, x, weight, assert_product_of_rounded)
    y, again = norms.rms_norm_forward(x, weight, EPS, unit_offset=True)
    assert torch.equal(rstd, again)
    check_gemma(y, x, weight, assert_rounded)


def test_the_bounds_notice_one_more_rounding_and_one_less(numbers, assert_rounded, assert_product_of_rounded):
    x, weight = numbers(16, 100, dtype=torch.bfloat16), numbers(100, dtype=torch.bfloat16, seed=1)
    right = (reference.rms_norm_forward(x, weight, EPS, unit)[0] for unit in (False, True))
    check_llama(next(right), x, weight, assert_product_of_rounded)
    check_gemma(next(right), x, weight, assert_rounded)
    unrounded = (exact_rms(x) * weight.double()).bfloat16()
    with pytest.raises(AssertionError, match="outside"):
        check_llama(unrounded, x, weight, assert_product_of_rounded)
    twice = exact_rms(x).bfloat16() * (1 + weight)
    with pytest.raises(AssertionError, match="outside"):
        check_gemma(twice, x, weight, assert_rounded)
    hollow = reference.rms_norm_forward(x, weight, EPS, False)[0].clone()
    hollow[3, 7] = float("nan")
    with pytest.raises(AssertionError, match="outside"):
        check_llama(hollow, x, weight, assert_product_of_rounded)


LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
GEMMA_LIKE = ("gemma", "gemma2", "gemma3")


def module_of(family: str, D: int, dtype: torch.dtype, weight: torch.Tensor) -> torch.nn.Module:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "gemma2": "Gemma2", "gemma3": "Gemma3"}
    module = getattr(modeling, f"{name.get(family, family.capitalize())}RMSNorm")(D, eps=EPS).to(dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [*LLAMA_LIKE, *GEMMA_LIKE])
def test_rms_norm_equals_transformers(isa, family, dtype, numbers):
    # Heads of 64 too: Qwen3 and Gemma 3 normalise queries and keys by head.
    for shape in ((2, 9, 1000), (2, 9, 4, 64)):
        D = shape[-1]
        x, weight = numbers(*shape, dtype=dtype, scale=3), numbers(D, dtype=dtype, seed=1, scale=0.5)
        with torch.no_grad():
            expected = module_of(family, D, dtype, weight)(x)
        unit_offset = family in GEMMA_LIKE
        got, _ = norms.rms_norm_forward(x, weight, EPS, unit_offset=unit_offset)
        # Both are the rounding of the same number, known to within this error: they differ only where the interval
        # holds a boundary between two roundings.
        exact, error = exact_rms(x), normalised_error(D)
        if unit_offset:
            exact, error = exact * (1 + weight.double()), error + 2 * UNIT
        same = (exact * (1 - error)).to(dtype) == (exact * (1 + error)).to(dtype)
        assert torch.equal(got[same], expected[same])
        # Of the others each is one rounding step off at most; its product with the weight two.
        if dtype is not torch.float32:
            assert same.float().mean() > 0.98
            spacing = torch.finfo(dtype).eps * expected.float().abs()
            assert ((got.float() - expected.float()).abs() <= 2 * spacing).all()
        else:
            torch.testing.assert_close(got, expected, rtol=2 * error, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_another_dtype_gives_what_transformers_gives(backend, dtype, numbers):
    x, weight = numbers(9, 100, dtype=dtype), numbers(100, seed=1)
    for family in ("llama", "gemma"):
        with torch.no_grad():
            expected = module_of(family, 100, torch.float32, weight)(x)
        unit_offset = family == "gemma"
        got, rstd = norms.rms_norm_forward(x, weight, EPS, unit_offset=unit_offset)
        assert got.dtype == expected.dtype == (dtype if unit_offset else torch.float32)
        assert (got == expected).float().mean() > 0.98
        dy = numbers(9, 100, dtype=got.dtype, seed=2)
        dx, dweight = norms.rms_norm_backward(dy, x, weight, rstd, unit_offset=unit_offset, weight_grad=True)
        assert (dx.dtype, dweight.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residual_is_added_and_rounded_first(backend, dtype, numbers):
    x, residual = (numbers(2, 5, 101, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = numbers(101, dtype=dtype, seed=2)
    for unit_offset in (False, True):
        y, rstd, total = norms.add_rms_norm_forward(x, residual, weight, EPS, unit_offset=unit_offset)
        expected, expected_rstd = norms.rms_norm_forward(x + residual, weight, EPS, unit_offset=unit_offset)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, expected)
        assert torch.equal(rstd, expected_rstd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_gradients_are_right_to_rounding(isa, D, dtype, unit_offset, numbers, assert_rounded):
    x, dy, extra = (numbers(37, D, dtype=dtype, seed=seed) for seed in range(3))
    weight = numbers(D, dtype=dtype, seed=3)
    _, rstd = norms.rms_norm_forward(x, weight, EPS, unit_offset=unit_offset)
    for residual_grad in (None, extra):
        dx, dweight = norms.rms_norm_backward(
            dy, x, weight, rstd, unit_offset=unit_offset, residual_grad=residual_grad, weight_grad=True
        )
        wide = None if residual_grad is None else residual_grad.double()
        exact, exact_dweight = reference.rms_norm_backward(
            dy.double(), x.double(), weight.double(), rstd.double(), unit_offset, wide, True
        )
        n = x.double() * rstd.double()[:, None]
        m = dy.double() * (weight.double() + unit_offset)
        # Every term is rounded a handful of times; the sum once per addition.
        magnitude = rstd[:, None].double() * (m.abs() + n.abs() * (m * n).abs().mean(-1, keepdim=True))
        error = (sum_error(D) + 12 * UNIT) * magnitude
        if wide is not None:
            error = error + 2 * UNIT * (exact.abs() + wide.abs())
        assert_rounded(dx, exact, error)
        if not unit_offset:  # the forward pass rounded n
            n = (x.float() * rstd[:, None]).to(dtype).double()
            exact_dweight = (dy.double() * n).sum(0)
        assert_rounded(dweight, exact_dweight, (37 + 4) * UNIT * (dy.double() * n).abs().sum(0))


def check_layer_norm(y, x, weight, bias, assert_rounded) -> None:
    wide, D = x.double(), x.shape[-1]
    exact = F.layer_norm(wide, (D,), weight.double(), bias.double() if bias is not None else None, 1e-5)
    n = F.layer_norm(wide, (D,), eps=1e-5)
    rstd = 1 / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    # The mean is off by its sum's error; n by that, and relatively as the RMS norm's.
    off = normalised_error(D) * n.abs() + 2 * rstd * sum_error(D) * wide.abs().mean(-1, keepdim=True)
    shift = 0 if bias is None else bias.double().abs()
    assert_rounded(y, exact, weight.double().abs() * (off + 2 * UNIT * n.abs()) + 2 * UNIT * shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2, *WIDTHS[1:]])
def test_layer_norm_and_torch_s_are_right_to_rounding(isa, D, dtype, numbers, assert_rounded):
    x = numbers(3, 5, D, dtype=dtype) + 0.5
    weight, bias = (numbers(D, dtype=dtype, seed=seed) for seed in (1, 2))
    for shift in (bias, None):
        y, mean, _ = norms.layer_norm_forward(x, weight, shift, 1e-5)
        check_layer_norm(y, x, weight, shift, assert_rounded)
        check_layer_norm(F.layer_norm(x, (D,), weight, shift, 1e-5), x, weight, shift, assert_rounded)
        assert_rounded(mean, x.double().mean(-1), sum_error(D) * x.double().abs().mean(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", WIDTHS)
def test_layer_norm_gradients_are_right_to_rounding(isa, D, dtype, numbers, assert_rounded):
    x, dy, extra = (numbers(37, D, dtype=dtype, seed=seed) for seed in range(3))
    weight = numbers(D, dtype=dtype, seed=3)
    _, mean, rstd = norms.layer_norm_forward(x, weight, None, 1e-5)
    dx, dweight, dbias = norms.layer_norm_backward(
        dy, x, weight, mean, rstd, residual_grad=extra, weight_grad=True
    )
    wide = [t.double() for t in (dy, x, weight, mean, rstd, extra)]
    exact, exact_dweight, exact_dbias = reference.layer_norm_backward(*wide, True)
    n = (wide[1] - wide[3][:, None]) * wide[4][:, None]
    m = wide[0] * wide[2]
    sums = m.abs().mean(-1, keepdim=True) + n.abs() * (m * n).abs().mean(-1, keepdim=True)
    error = (sum_error(D) + 12 * UNIT) * wide[4][:, None] * (m.abs() + sums)
    assert_rounded(dx, exact, error + 2 * UNIT * (exact.abs() + wide[5].abs()))
    assert_rounded(dweight, exact_dweight, (37 + 4) * UNIT * (wide[0] * n).abs().sum(0))
    assert_rounded(dbias, exact_dbias, (37 + 4) * UNIT * wide[0].abs().sum(0))


def test_gradients_by_difference_quotients_in_float64(numbers):
    x, residual = (numbers(3, 7, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1))
    weight, bias = (numbers(7, dtype=torch.float64, seed=seed).requires_grad_() for seed in (2, 3))
    check = torch.autograd.gradcheck
    for unit in (False, True):
        assert check(lambda x, w, u=unit: norms.rms_norm(x, w, 1e-3, unit_offset=u), (x, weight))
        assert check(
            lambda x, r, w, u=unit: norms.add_rms_norm(x, r, w, 1e-3, unit_offset=u), (x, residual, weight)
        )
    assert check(lambda x, w, b: norms.layer_norm(x, w, b, 1e-3), (x, weight, bias))
    assert check(lambda x, w: norms.layer_norm(x, w, None, 1e-3), (x, weight))


def test_gradcheck_notices_a_backward_function_without_its_mean(monkeypatch, numbers):
    def careless(dy, x, weight, rstd, **_):
        return dy * weight * rstd[..., None], (dy * x * rstd[..., None]).sum(0)

    monkeypatch.setattr(norms, "rms_norm_backward", careless)
    x, weight = numbers(3, 7).double().requires_grad_(), numbers(7, seed=1).double().requires_grad_()
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x, w: norms.rms_norm(x, w, 1e-3), (x, weight))


def test_weights_get_gradients_in_their_own_dtype(backend, numbers):
    x = numbers(2, 5, 33, dtype=torch.bfloat16).requires_grad_()
    weight = numbers(33, dtype=torch.bfloat16, seed=1).requires_grad_()
    bias = numbers(33, dtype=torch.bfloat16, seed=2).requires_grad_()
    norms.layer_norm(norms.rms_norm(x, weight, EPS), weight, bias, EPS).float().square().sum().backward()
    assert [t.grad.dtype for t in (x, weight, bias)] == [torch.bfloat16] * 3
    assert all(torch.isfinite(t.grad).all() for t in (x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(backend, dtype, numbers):
    x, weight = numbers(4, 100, dtype=dtype), numbers(100, dtype=dtype, seed=1)
    clean, _ = norms.rms_norm_forward(x, weight, EPS)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y, _ = norms.rms_norm_forward(x, weight, EPS)
    assert y[1].isnan().all()
    assert y[2, 5].isnan()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    layer, _, _ = norms.layer_norm_forward(x, weight, None, 1e-5)
    assert layer[1:3].isnan().all()
    assert layer[[0, 3]].isfinite().all()


def test_rows_of_zeros_and_of_subnormal_numbers(isa, numbers, assert_product_of_rounded):
    x = torch.zeros(3, 65)
    x[1] = numbers(65) * 1e-40
    x[2] = numbers(65) * 1e-20  # squares are subnormal, or 0
    weight = numbers(65, seed=1)
    check_llama(norms.rms_norm_forward(x, weight, EPS)[0], x, weight, assert_product_of_rounded)


def test_unfit_arguments_are_refused(numbers):
    x, weight, rstd = numbers(2, 5), numbers(5), numbers(2)
    with pytest.raises(KernelError, match=r"HB402.*weight is .*\(4,\).*expected \(5,\)"):
        norms.rms_norm_forward(x, numbers(4), EPS)
    with pytest.raises(KernelError, match="HB402.*weight.*float64"):
        norms.rms_norm_forward(x, weight.double(), EPS)
    with pytest.raises(KernelError, match="HB402.*x is torch.int64"):
        norms.rms_norm_forward(x.long(), weight, EPS)
    with pytest.raises(KernelError, match="HB402.*at least one number"):
        norms.rms_norm_forward(x[:, :0], weight[:0], EPS)
    with pytest.raises(KernelError, match="HB402.*residual"):
        norms.add_rms_norm_forward(x, x.bfloat16(), weight, EPS)
    with pytest.raises(KernelError, match=r"HB402.*dy is .*\(2, 4\)"):
        norms.rms_norm_backward(x[:, :4], x, weight, rstd)
    with pytest.raises(KernelError, match="HB402.*dy is torch.bfloat16.*expected.*float32"):
        norms.rms_norm_backward(x.bfloat16(), x, weight, rstd)
    with pytest.raises(KernelError, match="HB402.*rstd"):
        norms.rms_norm_backward(x, x, weight, rstd.bfloat16())
    with pytest.raises(KernelError, match="HB402.*residual_grad"):
        norms.rms_norm_backward(x, x, weight, rstd, residual_grad=x.bfloat16())
    with pytest.raises(KernelError, match="HB402.*mean"):
        norms.layer_norm_backward(x, x, weight, rstd[:1], rstd)
    with pytest.raises(KernelError, match="HB402.*bias"):
        norms.layer_norm_forward(x, weight, weight.bfloat16(), EPS)
