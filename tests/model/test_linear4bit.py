"""Promises of the 4-bit layer: torch sees its memory, nothing can cast its weight, gradients reach its input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from halfbyte.kernels import ops
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.quant.weight import QuantSpec

N, K = 37, 53

# One float32 sum of K products in another order: K roundings of half a unit in the last place.
SUM_TOLERANCE = K * 2.0**-24


@pytest.fixture
def layer() -> Linear4bit:
    generator = torch.Generator().manual_seed(0)
    weight = ops.quantize_4bit(torch.randn(N, K, generator=generator), QuantSpec())
    return Linear4bit(weight, torch.randn(N, generator=generator))


def x(rows: int = 5) -> torch.Tensor:
    return torch.randn(2, rows, K, generator=torch.Generator().manual_seed(1))


def test_it_multiplies_by_the_matrix_its_codes_stand_for(layer: Linear4bit) -> None:
    expected = F.linear(x(), ops.dequantize_4bit(layer.quantised_weight), layer.bias)
    assert (layer(x()) - expected).abs().max() <= SUM_TOLERANCE * expected.abs().max()


def test_gradients_reach_the_input_and_nothing_else(layer: Linear4bit) -> None:
    given = x().requires_grad_()
    layer(given).square().sum().backward()
    expected = x().requires_grad_()
    F.linear(expected, ops.dequantize_4bit(layer.quantised_weight), layer.bias).square().sum().backward()
    assert given.grad is not None
    assert expected.grad is not None
    assert (given.grad - expected.grad).abs().max() <= N * SUM_TOLERANCE * expected.grad.abs().max()
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_torch_sees_every_byte_of_the_weight(layer: Linear4bit) -> None:
    assert sum(buffer.nbytes for buffer in layer.buffers()) == layer.quantised_weight.nbytes
    assert dict(layer.named_parameters()).keys() == {"bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_leaves_the_weight_and_its_scales(layer: Linear4bit, dtype: torch.dtype) -> None:
    before = {name: tensor.clone() for name, tensor in layer.quantised_weight.tensors().items()}
    layer.to(dtype)
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    after = layer.quantised_weight.tensors()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert layer(x().to(dtype)).dtype == dtype


def test_its_state_restores_it(layer: Linear4bit) -> None:
    generator = torch.Generator().manual_seed(9)
    other = Linear4bit(ops.quantize_4bit(torch.randn(N, K, generator=generator), QuantSpec()), torch.zeros(N))
    assert not torch.equal(other(x()), layer(x()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x()), layer(x()))


def test_its_printed_form_tells_its_format() -> None:
    weight = ops.quantize_4bit(torch.ones(2, 3), QuantSpec("fp4", "absmax", False, 128))
    assert (
        repr(Linear4bit(weight))
        == "Linear4bit(in_features=3, out_features=2, bias=False, fp4, blocksize=128)"
    )
