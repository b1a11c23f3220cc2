"""The rotary embedding turns heads as transformers does, rounded once, wherever they lie in memory."""

from __future__ import annotations

import importlib

import pytest
import torch

from halfbyte.errors import KernelError
from halfbyte.kernels import reference, rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-24
# One rounding to a dtype, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def tables(B: int, T: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin with equal halves, as models have them, (B, T, R)."""
    frequencies = 100.0 ** (-torch.arange(R // 2) / (R // 2))
    angles = (torch.arange(B * T).reshape(B, T, 1) * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def magnitude(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Sum of the magnitudes of both products of every number turned."""
    R = cos.shape[-1]
    turned = x[..., :R].double().abs()
    swapped = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
    swapped_sin = torch.cat(sin.double().abs().chunk(2, dim=-1)[::-1], dim=-1)
    widest_sin = torch.maximum(sin.double().abs(), swapped_sin)[:, :, None]
    both = turned * cos.double().abs()[:, :, None] + swapped * widest_sin
    return torch.cat([both, torch.zeros_like(x[..., R:]).double()], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "R"), [(2, 2), (64, 64), (96, 72), (65, 64), (128, 2), (1030, 1028)])
@pytest.mark.parametrize("inverse", [False, True])
def test_heads_are_turned_and_rounded_once(isa, D, R, dtype, inverse, numbers, assert_rounded):
    for B, tables_B in ((1, 1), (2, 1), (2, 2)):
        x = numbers(B, 5, 3, D, dtype=dtype)
        # Halves that differ too: the inverse is the transposed map.
        cos, sin = (numbers(tables_B, 5, R, dtype=dtype, seed=seed) for seed in (1, 2))
        got = rotary.rotate(x, cos, sin, inverse=inverse)
        exact = reference.rotate(x.double(), cos.double(), sin.double(), inverse)
        # Two products and a sum.
        assert_rounded(got, exact, 2 * UNIT * magnitude(x, cos, sin))
        assert torch.equal(got[..., R:], x[..., R:])


def test_the_bound_notices_a_wrong_sign_and_a_second_rounding(numbers, assert_rounded):
    x, (cos, sin) = numbers(1, 9, 2, 64, dtype=torch.bfloat16), tables(1, 9, 64, torch.bfloat16)
    exact = reference.rotate(x.double(), cos.double(), sin.double(), False)
    error = 2 * UNIT * magnitude(x, cos, sin)
    assert_rounded(reference.rotate(x, cos, sin, False), exact, error)
    with pytest.raises(AssertionError, match="outside"):
        assert_rounded(reference.rotate(x, cos, sin, True), exact, error)
    x1, x2 = x.chunk(2, dim=-1)
    thrice = x * cos[:, :, None] + torch.cat([-x2, x1], dim=-1) * sin[:, :, None]
    with pytest.raises(AssertionError, match="outside"):
        assert_rounded(thrice, exact, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "R"), [("llama", 64), ("qwen3", 64), ("gemma", 64), ("phi3", 48)])
def test_heads_are_turned_as_transformers_turns_them(isa, family, R, dtype, numbers):
    apply = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    q, k = numbers(2, 9, 4, 64, dtype=dtype), numbers(2, 9, 2, 64, dtype=dtype, seed=1)
    cos, sin = tables(2, 9, R, dtype)
    expected = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, theirs in zip((q, k), expected, strict=True):
        got = rotary.rotate(x, cos, sin)
        # transformers rounds two products and their sum to the dtype, we the sum.
        bound = 3.01 * ROUNDING[dtype] * magnitude(x, cos, sin) + 1e-7
        assert ((got.double() - theirs.transpose(1, 2).double()).abs() <= bound).all()
        assert torch.equal(got[..., R:], x[..., R:])


def test_float32_tables_are_not_rounded_for_half_precision_heads(backend, numbers, assert_rounded):
    x, (cos, sin) = numbers(1, 9, 2, 64, dtype=torch.bfloat16), tables(1, 9, 64, torch.float32)
    exact = reference.rotate(x.double(), cos.double(), sin.double(), False)
    assert_rounded(rotary.rotate(x, cos, sin), exact, 2 * UNIT * magnitude(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [48, 64])
def test_heads_inside_of_a_fused_tensor_are_turned_where_they_lie(backend, R, dtype, numbers):
    B, T, H, D = 2, 7, 4, 64
    fused = numbers(B, T, 3 * H * D, dtype=dtype)
    cos, sin = tables(B, T, R, dtype)
    q, k, v = (part.unflatten(-1, (H, D)) for part in fused.split(H * D, dim=-1))
    expected = [rotary.rotate(x.contiguous(), cos, sin) for x in (q, k)]
    before = v.clone()
    # From strided rows into a new tensor, into another strided tensor, in place.
    assert torch.equal(rotary.rotate(q, cos, sin), expected[0])
    cache = numbers(B, H, 20, D, dtype=dtype, seed=1)
    untouched = cache.clone()
    slot = cache[:, :, 5 : 5 + T].transpose(1, 2)
    assert rotary.rotate(k, cos, sin, out=slot) is slot
    assert torch.equal(slot, expected[1])
    assert torch.equal(cache[:, :, :5], untouched[:, :, :5])
    assert torch.equal(cache[:, :, 5 + T :], untouched[:, :, 5 + T :])
    for x, turned in zip((q, k), expected, strict=True):
        assert rotary.rotate(x, cos, sin, out=x) is x
        assert torch.equal(x, turned)
    assert torch.equal(v, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_turning_back_gives_the_heads_again(backend, dtype, numbers):
    x, (cos, sin) = numbers(2, 9, 3, 64, dtype=dtype), tables(1, 9, 64, torch.float32)
    back = rotary.rotate(rotary.rotate(x, cos, sin), cos, sin, inverse=True)
    # Two roundings of numbers not larger than the pair, and cos² + sin² = 1 to a few units.
    torch.testing.assert_close(back, x, rtol=0, atol=(4 * ROUNDING[dtype] + 8 * UNIT) * x.abs().max().item())


def test_gradients_by_difference_quotients_in_float64(numbers):
    x = numbers(2, 3, 2, 10, dtype=torch.float64).requires_grad_()
    cos, sin = (numbers(1, 3, 8, dtype=torch.float64, seed=seed) for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda x: rotary.rotary(x, cos, sin), (x,))


def test_gradcheck_notices_a_turn_in_the_wrong_direction(monkeypatch, numbers):
    monkeypatch.setattr(
        rotary, "rotate", lambda x, cos, sin, inverse=False: reference.rotate(x, cos, sin, False)
    )
    x = numbers(1, 3, 2, 8, dtype=torch.float64).requires_grad_()
    cos, sin = tables(1, 3, 8, torch.float64)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: rotary.rotary(x, cos, sin), (x,))


def test_a_saved_tensor_that_was_turned_in_place_is_noticed(backend, numbers):
    x = numbers(1, 3, 2, 8).requires_grad_()
    y = x * 2
    z = y.square()
    rotary.rotate(y.detach(), *tables(1, 3, 8, torch.float32), out=y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_unfit_arguments_are_refused(numbers):
    x, (cos, sin) = numbers(2, 5, 3, 8), tables(1, 5, 8, torch.float32)
    with pytest.raises(KernelError, match="HB402.*x is.*expected.*B, T, H, D"):
        rotary.rotate(x[0], cos, sin)
    for wrong in (
        cos[:, :4],
        cos[..., :7],
        cos[..., :0],
        cos[0],
        cos.repeat(3, 1, 1),
        cos.double(),
        cos.long(),
    ):
        with pytest.raises(KernelError, match="HB402.*cos is"):
            rotary.rotate(x, wrong, wrong)
    with pytest.raises(KernelError, match="HB402.*cos is"):
        rotary.rotate(x[..., :6], cos, sin)
    with pytest.raises(KernelError, match="HB402.*sin is"):
        rotary.rotate(x, cos, sin.bfloat16())
    with pytest.raises(KernelError, match="HB402.*out is"):
        rotary.rotate(x, cos, sin, out=x[:1])
    with pytest.raises(KernelError, match="HB402.*out is.*next to each other"):
        rotary.rotate(x, cos, sin, out=numbers(2, 5, 8, 3).transpose(2, 3))
