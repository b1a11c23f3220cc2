"""Grouped products: sums of terms in one call, rounded once, in both directions and on every backend."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_parity import DTYPES, ROUNDING, SUBNORMAL, SUM, matrix

from halfbyte.errors import KernelError
from halfbyte.kernels import ops, reference
from halfbyte.kernels.linear import linear, linear_grad
from halfbyte.kernels.terms import Factor, Product, Term
from halfbyte.quant.weight import QuantSpec

# (M, N, K, R): odd sizes, whole blocks, fewer rows than a tile, more than a panel.
SIZES = (
    (1, 64, 64, 8),
    (3, 5, 7, 3),
    (8, 70, 128, 16),
    (9, 130, 192, 1),
    (67, 64, 96, 5),
    (130, 200, 320, 16),
)


def dense(factor: Factor, dtype: torch.dtype) -> torch.Tensor:
    return (
        factor.double()
        if isinstance(factor, torch.Tensor)
        else reference.dequantize_4bit(factor, dtype).double()
    )


def assert_right(got: torch.Tensor, product: Product, grad: bool) -> None:
    """Compares with float64 on the identical operands; the bound is that of `test_parity`, summed over the terms."""
    exact: torch.Tensor | float = 0.0
    bound: torch.Tensor | float = SUBNORMAL[got.dtype]
    for a, factor in product.terms:
        weight = dense(factor, a.dtype) if grad else dense(factor, a.dtype).T
        exact = exact + a.double() @ weight
        magnitude = a.double().norm(dim=1, keepdim=True) * weight.norm(dim=0)
        bound = bound + SUM * a.shape[1] ** 0.5 * magnitude
    for added in (product.bias, product.residual):
        if added is not None:
            exact = exact + added.double()
            bound = bound + SUM * added.double().abs()
    assert torch.isfinite(got).all()
    assert isinstance(exact, torch.Tensor)
    excess = (got.double() - exact).abs() - bound - ROUNDING[got.dtype] * exact.abs() * 1.01
    assert excess.max() <= 0, f"off by {excess.max():.3g} more than allowed"


def weights(N: int, K: int, dtype: torch.dtype) -> Factor:
    return ops.quantize_4bit(matrix((N, K), torch.float32, N + K), QuantSpec(double_quant=N % 2 == 0)).parts()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layers_with_branches_and_a_shared_input_are_right_to_rounding(backend, size, dtype):
    M, N, K, R = size
    x, both = matrix((M, K), dtype), matrix((M, 2 * R), dtype, 1)
    products = [
        Product(
            (Term(x, weights(N, K, dtype)), Term(both[:, :R], matrix((N, R), dtype, 2))),
            matrix((1, N), dtype, 3)[0],
        ),
        Product((Term(x, weights(N + 1, K, dtype)), Term(both[:, R:], matrix((N + 1, R), dtype, 4)))),
        Product((Term(x, matrix((N, K), dtype, 5)),), None, matrix((M, N), dtype, 6)),
    ]
    for got, product in zip(linear(products), products, strict=True):
        assert got.dtype == dtype
        assert_right(got, product, grad=False)
    for got, product in zip(linear(products, torch.float32), products, strict=True):
        assert got.dtype == torch.float32
        assert_right(got, product, grad=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_of_layers_that_share_an_input_are_summed_before_they_are_rounded(backend, size, dtype):
    M, N, K, R = size
    wide = matrix((M, 2 * N + 2), dtype)
    products = [
        Product(
            (
                Term(wide[:, :N], weights(N, K, dtype)),
                Term(wide[:, N : 2 * N + 1], weights(N + 1, K, dtype)),
                Term(matrix((M, R), dtype, 2), matrix((R, K), dtype, 3)),
            ),
            residual=matrix((M, K), dtype, 4),
        ),
        Product((Term(matrix((R, M), dtype, 5), matrix((M, N), dtype, 6)),)),
    ]
    for out_dtype in (dtype, torch.float32):
        for got, product in zip(linear_grad(products, out_dtype), products, strict=True):
            assert got.dtype == out_dtype
            assert_right(got, product, grad=True)


def test_the_bound_notices_a_forgotten_term():
    x, u = matrix((9, 64), torch.bfloat16), matrix((9, 8), torch.bfloat16, 1)
    whole = Product(
        (Term(x, matrix((64, 64), torch.bfloat16, 2)), Term(u, matrix((64, 8), torch.bfloat16, 3)))
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_right(linear([Product(whole.terms[:1])])[0], whole, grad=False)


def test_threads_do_not_change_a_bit_of_any_direction():
    before = torch.get_num_threads()
    x, dy = matrix((130, 192), torch.bfloat16), matrix((130, 70), torch.bfloat16, 1)
    factor = weights(70, 192, torch.bfloat16)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    *linear(
                        [Product((Term(x, factor),)), Product((Term(x, matrix((16, 192), torch.bfloat16)),))]
                    ),
                    *linear_grad(
                        [Product((Term(dy, factor),)), Product((Term(x, matrix((192, 16), torch.bfloat16)),))]
                    ),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_shape_functions_and_schemas_agree_with_what_is_computed():
    x, dy = matrix((5, 64), torch.float32), matrix((5, 37), torch.float32)
    factor = weights(37, 64, torch.float32)
    flat = ([*factor[:6]], [*factor[6:]], [1], [None], [None], torch.bfloat16)
    torch.library.opcheck(torch.ops.halfbyte.linear.default, ([x], *flat))
    torch.library.opcheck(torch.ops.halfbyte.linear_grad.default, ([dy], *flat))


def bad_products() -> dict[str, Product]:
    x = torch.randn(3, 64)
    w = torch.randn(8, 64)
    return {
        "no terms": Product(()),
        "(3, 64)": Product((Term(torch.randn(3, 60), w),)),
        "strides": Product((Term(torch.randn(64, 3).T, w),)),
        "a weight": Product((Term(x, w.double()),)),
        "contiguous rows": Product((Term(x, torch.randn(64, 8).T),)),
        "bias": Product((Term(x, w),), torch.randn(9)),
        "residual": Product((Term(x, w),), None, torch.randn(8, 3).T),
        "for 8 results": Product((Term(x, w), Term(x, torch.randn(9, 64)))),
    }


@pytest.mark.parametrize("said", bad_products())
def test_what_does_not_fit_is_refused_by_name(said):
    with pytest.raises(KernelError, match="HB402") as refused:
        linear([bad_products()[said]])
    assert said in str(refused.value)


def test_products_of_different_rows_and_a_bias_of_a_gradient_are_refused():
    w = torch.randn(8, 64)
    with pytest.raises(KernelError, match="one number of rows"):
        linear([Product((Term(torch.randn(3, 64), w),)), Product((Term(torch.randn(4, 64), w),))])
    with pytest.raises(KernelError, match="a bias"):
        linear_grad([Product((Term(torch.randn(3, 8), w),), torch.randn(64))])
