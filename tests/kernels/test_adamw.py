"""AdamW with 8-bit states: parity with the reference to the bit, bitsandbytes' maps and codes, and its whole step."""

from __future__ import annotations

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.kernels import native, reference
from halfbyte.kernels.adamw import STATE_BLOCK, AdamWFactors, State8bit, adamw_8bit_
from halfbyte.quant.codebook import dynamic_bounds, dynamic_map

ISAS = [name for name, state in native.module().instruction_sets() if state == "runs"]
ODD_SIZES = (0, 1, 7, 255, 256, 257, 511, 4096, 100_003)


def _zeros(count: int) -> State8bit:
    blocks = -(-count // STATE_BLOCK)
    codes = (torch.zeros(count, dtype=torch.uint8) for _ in range(2))
    return State8bit(*codes, torch.zeros(blocks), torch.zeros(blocks))


def _factors(step: int = 1, **changes: float) -> AdamWFactors:
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1} | changes
    betas = (settings.pop("beta1", 0.9), settings.pop("beta2", 0.999))
    return AdamWFactors.of(betas=betas, step=step, **settings)


@pytest.fixture(params=ISAS)
def isa(request):
    module = native.module()
    before = module.active()
    assert module.use(request.param)
    yield request.param
    module.use(before)


@pytest.mark.parametrize("count", ODD_SIZES)
def test_every_instruction_set_gives_the_reference_s_bits(isa, count):
    torch.manual_seed(count)
    ours, theirs = torch.randn(count), None
    theirs = ours.clone()
    state, expected = _zeros(count), _zeros(count)
    for step in range(1, 5):
        gradient = torch.randn(count) * torch.exp(4 * torch.randn(count))
        gradient[::5] = 0.0
        factors = _factors(step)
        adamw_8bit_(ours, gradient, state, factors)
        reference.adamw_8bit_(theirs, gradient, *expected, list(factors))
        for got, want in zip((ours, *state), (theirs, *expected), strict=True):
            assert got.numpy().tobytes() == want.numpy().tobytes()


@pytest.mark.parametrize("signed", [True, False])
def test_maps_are_bitsandbytes_to_the_bit(signed):
    theirs = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    assert dynamic_map(signed=signed).tobytes() == theirs.tobytes()


def _neighbours(bounds: np.ndarray) -> Tensor:
    """Every bound and the three floats to either side of it."""
    found, up, down = [bounds], bounds, bounds
    for _ in range(3):
        up, down = np.nextafter(up, np.float32(2)), np.nextafter(down, np.float32(-2))
        found += [up, down]
    return torch.from_numpy(np.concatenate(found))


def _blocks_of(numbers: Tensor) -> Tensor:
    """The numbers in blocks whose largest magnitude is 1, so that they are what is looked up."""
    per = STATE_BLOCK - 1
    padded = torch.nn.functional.pad(numbers, (0, -numbers.numel() % per)).view(-1, per)
    return torch.nn.functional.pad(padded, (1, 0), value=1.0).flatten()


def test_codes_at_every_bound_and_its_neighbours_are_right(isa):
    """With β₁ = 0 the average is the gradient itself, so that every float can be asked for its code."""
    gradient = _blocks_of(_neighbours(dynamic_bounds()))
    state = _zeros(gradient.numel())
    adamw_8bit_(torch.zeros_like(gradient), gradient, state, _factors(beta1=0.0))
    expected = torch.bucketize(gradient, torch.from_numpy(dynamic_bounds().copy())).to(torch.uint8)
    assert torch.equal(state.exp_avg_scale, torch.ones_like(state.exp_avg_scale))
    assert torch.equal(state.exp_avg, expected)
    assert set(expected.tolist()) == set(range(256))


def test_codes_of_squares_around_every_bound_are_right(isa):
    """Squares do not reach every float: roots of the bounds and their neighbours come as near as they can."""
    gradient = _blocks_of(_neighbours(np.sqrt(dynamic_bounds(signed=False))))
    state = _zeros(gradient.numel())
    adamw_8bit_(torch.zeros_like(gradient), gradient, state, _factors(beta2=0.0))
    expected = torch.bucketize(gradient * gradient, torch.from_numpy(dynamic_bounds(signed=False).copy()))
    assert torch.equal(state.exp_avg_sq, expected.to(torch.uint8))
    assert set(expected.tolist()) == set(range(256))


def test_a_step_from_any_state_is_bitsandbytes_s():
    """Its codes for float64 are computed by distances; those for float32 are looked up in a table that is coarser."""
    torch.manual_seed(3)
    count, factors = 8 * STATE_BLOCK, _factors(7)
    signed, unsigned = (torch.from_numpy(dynamic_map(signed=s).copy()) for s in (True, False))
    codes = torch.randint(0, 256, (2, count), dtype=torch.uint8)
    state = State8bit(codes[0], codes[1], torch.rand(8) + 0.5, torch.rand(8) + 0.5)
    parameter, gradient = torch.randn(count), torch.randn(count)
    theirs, their_state = parameter.clone(), [part.clone() for part in state]
    m = signed[codes[0].long()].double() * state.exp_avg_scale.double().repeat_interleave(STATE_BLOCK)
    v = unsigned[codes[1].long()].double() * state.exp_avg_sq_scale.double().repeat_interleave(STATE_BLOCK)
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
        "adam", gradient, theirs, their_state[0], their_state[1], 0.9, 0.999, 0.0, 0.0, 1e-8, 7, 1e-2,
        signed.clone(), unsigned.clone(), their_state[2], their_state[3], 0.1, 1.0, False,
    )  # fmt: skip
    adamw_8bit_(parameter, gradient, state, factors)
    # Seven roundings on each side, of numbers no larger than the weight or its step.
    move = (theirs - parameter).abs()
    assert bool((move <= 8 * 2.0**-23 * torch.maximum(parameter.abs(), torch.tensor(1e-1))).all())
    for number, code, scale, their_scale, values in (
        (0.9 * m + 0.1 * gradient.double(), state.exp_avg, state.exp_avg_scale, their_state[2], signed),
        (
            0.999 * v + 1e-3 * gradient.double() ** 2,
            state.exp_avg_sq,
            state.exp_avg_sq_scale,
            their_state[3],
            unsigned,
        ),
    ):
        assert bool(((scale - their_scale).abs() <= 4 * 2.0**-24 * scale).all())
        expected, _ = torch.ops.bitsandbytes.quantize_blockwise(number, values, STATE_BLOCK)
        x = number / scale.double().repeat_interleave(STATE_BLOCK)
        middles = (values[1:].double() + values[:-1].double()) / 2
        from_middle = (x[:, None] - middles).abs().amin(dim=1)
        sure = from_middle > 8 * 2.0**-24 * x.abs()
        assert torch.equal(code[sure], expected[sure])
        assert sure.float().mean() > 0.999


def test_a_block_of_nothing_and_one_of_almost_nothing_stay_finite(isa):
    gradient = torch.zeros(3 * STATE_BLOCK)
    gradient[STATE_BLOCK : 2 * STATE_BLOCK] = 1e-42  # a scale whose reciprocal is infinite
    gradient[2 * STATE_BLOCK :] = 1e-30  # squares underflow
    parameter, state = torch.ones(gradient.numel()), _zeros(gradient.numel())
    for step in (1, 2, 3):
        adamw_8bit_(parameter, gradient, state, _factors(step))
    assert torch.isfinite(parameter).all()
    assert all(torch.isfinite(scale).all() for scale in state[2:])
    assert set(state.exp_avg[: 2 * STATE_BLOCK].tolist()) == {127}
    assert set(state.exp_avg_sq.tolist()) == {0}


@pytest.mark.parametrize("field", ["parameter", "gradient", *State8bit._fields])
def test_what_does_not_fit_is_refused_by_name(field):
    tensors = {"parameter": torch.zeros(300), "gradient": torch.zeros(300), **_zeros(300)._asdict()}
    wrong = tensors[field]
    for bad in (wrong[:-1], wrong.double(), wrong.repeat_interleave(2)[::2]):
        given = tensors | {field: bad}
        state = State8bit(*(given[name] for name in State8bit._fields))
        with pytest.raises(KernelError, match="HB402"):
            adamw_8bit_(given["parameter"], given["gradient"], state, _factors())


def test_the_operation_is_known_to_torch():
    count = 300
    tensors = (torch.randn(count), torch.randn(count), *_zeros(count))
    torch.library.opcheck(torch.ops.halfbyte.adamw_8bit_, (*tensors, list(_factors())))
