"""What holds for all element-wise and row-wise operations: threads, shapes, strides, and torch's view of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from halfbyte.kernels import activations, norms, rotary
from halfbyte.kernels.cpu import rows as cpu_rows

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


def everything(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """All results of all operations on two tensors (..., D) and a weight (D)."""
    results: list[torch.Tensor | None] = []
    for unit in (False, True):
        y, rstd, total = norms.add_rms_norm_forward(x, other, weight, 1e-6, unit_offset=unit)
        results += [y, rstd, total]
        results += norms.rms_norm_backward(
            other, x, weight, rstd, unit_offset=unit, residual_grad=other, weight_grad=True
        )
    y, mean, rstd = norms.layer_norm_forward(x, weight, weight, 1e-5)
    results += [y, mean, rstd, *norms.layer_norm_backward(other, x, weight, mean, rstd, weight_grad=True)]
    for kind in KINDS:
        results.append(activations.activation_forward(x, kind))
        results.append(activations.activation_backward(other, x, kind))
        results.append(activations.gated_forward(x, other, kind))
        results += activations.gated_backward(weight.expand_as(x), x, other, kind, recompute_h=True)
    return [result for result in results if result is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_do_not_change_a_bit(dtype, numbers):
    x, other, weight = (
        numbers(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(201, 173)] * 2 + [(173,)])
    )
    heads, table = numbers(2, 67, 3, 64, dtype=dtype), numbers(2, 67, 64, dtype=dtype, seed=3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append([*everything(x, other, weight), rotary.rotate(heads, table, table)])
    finally:
        torch.set_num_threads(before)
    for results in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, found[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (7,), (1, 1, 1, 1, 7)], ids=str)
def test_any_leading_shape_also_an_empty_one(backend, shape, numbers):
    x, other, weight = numbers(*shape), numbers(*shape, seed=1), numbers(7, seed=2)
    flat = everything(x.reshape(-1, 7), other.reshape(-1, 7), weight)
    for got, expected in zip(everything(x, other, weight), flat, strict=True):
        assert torch.equal(got.reshape(expected.shape), expected)
        assert got.is_contiguous()
    assert activations.gated_forward(x[..., :0], x[..., :0], "silu").shape == (*shape[:-1], 0)
    empty, table = numbers(2, 0, 3, 8), numbers(1, 0, 8)
    assert rotary.rotate(empty, table, table).shape == (2, 0, 3, 8)
    assert rotary.rotate(empty, table, table, out=empty) is empty


STRIDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    "numbers apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "backwards": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("how", STRIDED)
def test_strides_do_not_change_a_bit(isa, how, numbers):
    x, other, weight = numbers(2, 3, 5, 33), numbers(2, 3, 5, 33, seed=1), numbers(33, seed=2)
    expected = everything(x, other, weight)
    strided = STRIDED[how](x)
    assert torch.equal(strided, x)
    assert not strided.is_contiguous()
    for a, b in ((strided, other), (x, STRIDED[how](other)), (strided, STRIDED[how](other))):
        results = everything(a, b, torch.stack([weight, weight], dim=1)[:, 0])
        assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))
    table = numbers(2, 3, 32, seed=3)
    turned = rotary.rotate(x, table, table)
    assert torch.equal(rotary.rotate(strided, table, table), turned)


def test_heads_of_a_fused_tensor_are_not_copied(numbers):
    q = numbers(2, 7, 3 * 4 * 64)[..., 256:512].unflatten(-1, (4, 64))
    found = cpu_rows.layout(q, q.contiguous())
    assert found is not None
    extent, ((address, _, *strides), _) = found
    assert address == q.data_ptr()
    assert (extent, strides) == ((1, 14, 4, 64), [0, 768, 64])
    assert cpu_rows.layout(q.transpose(2, 3)) is None


def test_arguments_are_left_as_they_were(backend, numbers):
    x, other, weight = numbers(6, 33), numbers(6, 33, seed=1), numbers(33, seed=2)
    before = [t.clone() for t in (x, other, weight)]
    everything(x, other, weight)
    assert all(torch.equal(a, b) for a, b in zip((x, other, weight), before, strict=True))


def test_registration_passes_torch_s_own_checks(numbers):
    x, dy, weight, rstd = numbers(3, 8), numbers(3, 8, seed=1), numbers(8, seed=2), numbers(3, seed=3)
    heads, table = numbers(2, 3, 2, 8), numbers(1, 3, 6, seed=1)
    op = torch.ops.halfbyte
    for operation, arguments in {
        op.rms_norm_forward: (x, weight, 1e-6, False),
        op.add_rms_norm_forward: (x, dy, weight, 1e-6, True),
        op.rms_norm_backward: (dy, x, weight, rstd, False, dy, True),
        op.layer_norm_forward: (x, weight, weight, 1e-5),
        op.layer_norm_backward: (dy, x, weight, rstd, rstd, None, False),
        op.rotate: (heads, table, table, False),
        op.rotate_: (heads.clone(), table, table, True),
        op.rotate_out: (heads, table, table, False, heads.clone()),
        op.activation_forward: (x, "gelu"),
        op.activation_backward: (dy, x, "relu"),
        op.gated_forward: (x, dy, "silu"),
        op.gated_backward: (dy, x, dy, "gelu_tanh", True),
        op.gated_backward_: (dy, x.clone(), dy.clone(), "silu", False),
    }.items():
        assert set(torch.library.opcheck(operation.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does
def test_operations_are_traced_whole_with_their_gradients(numbers):
    weight, cos, sin = numbers(8, seed=2), numbers(1, 3, 8, seed=1), numbers(1, 3, 8, seed=5)

    def block(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, total = norms.add_rms_norm(x, residual, weight, 1e-6)
        turned = rotary.rotary(y, cos, sin)
        return activations.gated(turned, norms.layer_norm(total, weight, None, 1e-5), "silu")

    arguments = [numbers(2, 3, 2, 8, seed=seed).requires_grad_() for seed in (3, 4)]
    expected = torch.autograd.grad(block(*arguments).square().sum(), arguments)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
