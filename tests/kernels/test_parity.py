"""Every instruction set means what the reference says: bit for bit where nothing is summed, else within bounds."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels import backends, ops, reference
from halfbyte.quant.codebook import FORMATS, codebook
from halfbyte.quant.weight import QuantSpec, decode_scales

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1),
    (1, 64),
    (3, 5),
    (64, 64),
    (37, 101),
    (64, 96),
    (70, 172),
    (130, 200),
    (65, 1030),
    (192, 512),
)
ROWS = (1, 8, 9, 33)

# One rounding of the result to its dtype: half a unit in the last place, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Sums in float32 in any order: each of K additions rounds by 2^-24 of a partial sum; partial sums of independent
# terms grow like sqrt(K) of a term, so errors grow like sqrt(K) * |x| |w|; 4 standard deviations.
SUM = 4 * 2.0**-24
# float16 results below the smallest normal number are spaced 2^-24 apart.
SUBNORMAL = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
# Squared errors of a search are summed in another order: K = 64 terms of float32.
SEARCH = 64 * 2.0**-24


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close_to_exact(
    got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Compares with a · bᵀ + bias in float64 on the identical, already rounded operands."""
    a, b = a.double(), b.double()
    exact = a @ b.T
    magnitude = a.abs().square().sum(1, keepdim=True).sqrt() * b.square().sum(1).sqrt()
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    bound = (
        ROUNDING[got.dtype] * exact.abs() * 1.01 + SUM * a.shape[1] ** 0.5 * magnitude + SUBNORMAL[got.dtype]
    )
    excess = (got.double() - exact).abs() - bound
    assert torch.isfinite(got).all()
    assert excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def test_the_bound_notices_one_wrong_weight():
    a, b = matrix((9, 512), torch.bfloat16), matrix((64, 512), torch.bfloat16, 1)
    wrong = b.clone()
    wrong[5, 100] += 0.25
    got = (a.float() @ wrong.float().T).bfloat16()
    with pytest.raises(AssertionError, match="off by"):
        assert_close_to_exact(got, a, b, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_and_codes_equal_the_reference_bit_for_bit(isa, shape, dtype):
    weight = matrix(shape, dtype)
    for fmt in FORMATS:
        values = torch.from_numpy(codebook(fmt).copy())
        scales = backends.implementation("block_scales", dtype)(weight, 64)
        assert torch.equal(scales, reference.block_scales(weight, 64))
        codes = backends.implementation("encode_4bit", dtype)(weight, scales, values, 64)
        assert torch.equal(codes, reference.encode_4bit(weight, scales, values, 64))


@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_larger_blocks_agree_too(isa, blocksize):
    weight = matrix((70, 172), torch.float32)
    spec = QuantSpec(blocksize=blocksize)
    quantised = ops.quantize_4bit(weight, spec)
    assert torch.equal(
        decode_scales(quantised.parts()).isfinite(), torch.ones(-(-70 * 172 // blocksize)).bool()
    )
    assert torch.equal(
        ops.dequantize_4bit(quantised), reference.dequantize_4bit(quantised.parts(), torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_values_equal_the_reference_bit_for_bit(isa, shape, dtype, double_quant):
    for fmt in FORMATS:
        spec = QuantSpec(format=fmt, double_quant=double_quant)
        quantised = ops.quantize_4bit(matrix(shape, torch.float32), spec)
        expected = reference.dequantize_4bit(quantised.parts(), dtype)
        assert torch.equal(ops.dequantize_4bit(quantised, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_and_its_gradient_are_right_to_rounding(isa, shape, dtype):
    N, K = shape
    quantised = ops.quantize_4bit(matrix(shape, torch.float32), QuantSpec(double_quant=N % 2 == 0))
    weight = reference.dequantize_4bit(quantised.parts(), dtype)
    bias = matrix((1, N), dtype, 3)[0]
    for M in ROWS:
        x, dy = matrix((M, K), dtype, 1), matrix((M, N), dtype, 2)
        assert_close_to_exact(ops.linear_4bit(x, quantised, bias), x, weight, bias)
        x.requires_grad_()
        (dx,) = torch.autograd.grad(ops.linear_4bit(x, quantised), x, dy)
        assert_close_to_exact(dx, dy, weight.T, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_one_pass_takes(isa, dtype):
    quantised = ops.quantize_4bit(matrix((70, 130), torch.float32))
    x = matrix((1030, 130), dtype, 1)
    weight = reference.dequantize_4bit(quantised.parts(), dtype)
    assert_close_to_exact(ops.linear_4bit(x, quantised), x, weight, None)
    dy = matrix((1030, 70), dtype, 2)
    dx = torch.ops.halfbyte.linear_4bit_grad(dy, *quantised.parts())
    assert_close_to_exact(dx, dy, weight.T, None)


@pytest.mark.parametrize("shape", [(3, 5), (64, 96), (40, 172)], ids=str)
def test_search_finds_errors_as_small_as_the_reference(isa, shape):
    weight = matrix(shape, torch.float32)
    for fmt in FORMATS:
        values = torch.from_numpy(codebook(fmt).copy())

        def error(scales: torch.Tensor, values: torch.Tensor = values, fmt: str = fmt) -> float:
            codes = reference.encode_4bit(weight, scales, values, 64)
            quantised = ops.quantize_4bit(weight, QuantSpec(format=fmt, double_quant=False))
            parts = quantised.parts()._replace(codes=codes, scales=scales)
            return float((reference.dequantize_4bit(parts, torch.float32) - weight).square().sum())

        found = error(backends.implementation("search_scales", torch.float32)(weight, values, 64))
        expected = error(reference.search_scales(weight, values, 64))
        assert abs(found - expected) <= SEARCH * expected
        assert found <= error(reference.block_scales(weight, 64))


def test_threads_do_not_change_a_bit():
    quantised = ops.quantize_4bit(matrix((200, 172), torch.bfloat16))
    x = matrix((40, 172), torch.bfloat16, 1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((ops.linear_4bit(x, quantised), ops.linear_4bit(x[:2], quantised)))
    finally:
        torch.set_num_threads(before)
    for many, few in results[1:]:
        assert torch.equal(many, results[0][0])
        assert torch.equal(few, results[0][1])


def test_blocks_of_zeros_tiny_and_huge_numbers_stay_finite(backend):
    weight = torch.zeros(4, 64)
    weight[1] = 1e-42  # below the smallest normal number: becomes zeros
    weight[2] = torch.linspace(-1.5e38, 1.5e38, 64)
    weight[3] = torch.linspace(-1e-37, 1e-37, 64)
    back = ops.dequantize_4bit(ops.quantize_4bit(weight, QuantSpec(double_quant=False)))
    assert torch.isfinite(back).all()
    assert (back[:2] == 0).all()
    for row in (2, 3):
        assert (back[row] - weight[row]).abs().max() <= 0.16 * weight[
            row
        ].abs().max()  # widest gap of NF4, halved
