"""The operations as torch sees them: gradients, shape functions, refusals."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import KernelError
from halfbyte.kernels import backends, ops
from halfbyte.quant.weight import QuantSpec


@pytest.fixture
def weight():
    return ops.quantize_4bit(torch.randn(37, 101, generator=torch.Generator().manual_seed(0)))


def test_gradcheck_and_second_derivative_in_float64():
    weight = ops.quantize_4bit(torch.randn(5, 13))
    x = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_4bit(x, weight, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: ops.linear_4bit(x, weight, b), (x, bias))


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient:UserWarning")  # gradcheck dislikes float32
def test_gradcheck_of_the_fast_kernels_in_float32(backend):
    weight = ops.quantize_4bit(torch.randn(7, 33))
    # The function is linear: a difference quotient with a wide step has no truncation error, only float32 rounding.
    for M in (2, 9):
        x = torch.randn(M, 33, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x: ops.linear_4bit(x, weight), (x,), eps=1.0, atol=2e-5, rtol=1e-4, nondet_tol=0.0
        )


def test_registration_passes_torch_s_own_checks(weight):
    x = torch.randn(5, 101)
    parts = weight.parts()
    matrix = torch.randn(6, 64)
    scales = torch.ops.halfbyte.block_scales(matrix, 64)
    for op, arguments in {
        torch.ops.halfbyte.linear_4bit.default: (x.clone().requires_grad_(), None, *parts),
        torch.ops.halfbyte.linear_4bit_grad.default: (torch.randn(5, 37), *parts),
        torch.ops.halfbyte.dequantize_4bit.default: (*parts, torch.bfloat16),
        torch.ops.halfbyte.block_scales.default: (matrix, 64),
        torch.ops.halfbyte.search_scales.default: (matrix, weight.codebook, 64),
        torch.ops.halfbyte.encode_4bit.default: (matrix, scales, weight.codebook, 64),
    }.items():
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


def test_leading_dimensions_and_strides_are_kept(backend, weight):
    x = torch.randn(101, 4, 3).permute(2, 1, 0)
    assert not x.is_contiguous()
    y = ops.linear_4bit(x, weight)
    assert y.shape == (3, 4, 37)
    dense = ops.dequantize_4bit(weight)
    torch.testing.assert_close(y, x @ dense.T)


def test_empty_batch_gives_an_empty_result(backend, weight):
    assert ops.linear_4bit(torch.empty(0, 101), weight).shape == (0, 37)


def test_nothing_is_saved_for_the_frozen_weight_but_its_own_tensors(weight):
    x = torch.randn(4, 101, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.linear_4bit(x, weight)
    assert set(saved) <= {t.data_ptr() for t in weight.tensors().values()}
    assert saved


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scales", ["absmax", "mse"])
def test_non_finite_weight_is_refused_with_its_place(backend, bad, scales):
    weight = torch.randn(70, 101)
    weight[41, 17] = bad
    with pytest.raises(KernelError, match=r"HB401.*element \(41, 17\)"):
        ops.quantize_4bit(weight, QuantSpec(scales=scales))


def test_unfit_arguments_are_refused(weight):
    with pytest.raises(KernelError, match=r"HB402.*\(2, 100\).*expected \(\.\.\., 101\)"):
        ops.linear_4bit(torch.randn(2, 100), weight)
    with pytest.raises(KernelError, match="HB402.*int64"):
        ops.linear_4bit(torch.ones(2, 101, dtype=torch.int64), weight)
    with pytest.raises(KernelError, match="HB402.*bias"):
        ops.linear_4bit(torch.randn(2, 101), weight, torch.randn(36))
    with pytest.raises(KernelError, match="HB402.*bias"):
        ops.linear_4bit(torch.randn(2, 101).bfloat16(), weight, torch.randn(37))
    with pytest.raises(KernelError, match="HB402"):
        ops.quantize_4bit(torch.randn(64))
    with pytest.raises(KernelError, match="HB402"):
        ops.quantize_4bit(torch.empty(0, 64))
    with pytest.raises(KernelError, match="HB402"):
        ops.quantize_4bit(torch.randn(4, 64).double())
    with pytest.raises(KernelError, match="HB402"):
        ops.dequantize_4bit(weight, torch.int32)
    with pytest.raises(KernelError, match="HB402.*meta"):
        ops.linear_4bit(torch.randn(2, 101, device="meta"), weight)


def test_quantising_does_not_change_its_input(backend):
    weight = torch.randn(33, 65)
    before = weight.clone()
    ops.quantize_4bit(weight, QuantSpec(scales="mse"))
    assert torch.equal(weight, before)


def test_doctor_names_a_backend_for_every_operation():
    choices = backends.describe()
    assert {choice.operation for choice in choices} == set(backends.OPERATIONS)
    assert all(choice.backend and choice.why for choice in choices)
