"""A quantised weight's parts fit together, and nested scales mean what the format says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from halfbyte.errors import KernelError
from halfbyte.kernels import ops
from halfbyte.quant.codebook import dynamic_map
from halfbyte.quant.weight import QuantSpec, StoredScales, decode_scales, nearest_codes, nest_scales

# A nested scale is off by at most half the widest gap of the dynamic map (0.0139 next to ±1) of its block's maximum.
NESTED_ERROR = 0.5 * 0.0142


def test_bytes_per_weight_are_those_of_the_paper():
    weight = ops.quantize_4bit(torch.randn(1024, 1024))
    tables = 4 * 16 + 4 * 256 + 4
    assert (weight.nbytes - tables) * 8 / 1024**2 == pytest.approx(4.127, abs=0.0005)
    plain = ops.quantize_4bit(torch.randn(1024, 1024), QuantSpec(double_quant=False))
    assert (plain.nbytes - 4 * 16) * 8 / 1024**2 == 4.5


def test_nested_scales_stay_within_the_map_s_resolution():
    scales = torch.rand(1000) * 3 + 0.1
    stored = nest_scales(scales)
    largest = (scales - scales.mean()).abs().max()
    assert stored.scales.dtype == torch.uint8
    assert (decode_scales(stored) - scales).abs().max() <= NESTED_ERROR * largest


def test_equal_scales_are_nested_without_error():
    assert torch.equal(decode_scales(nest_scales(torch.full((300,), 0.37))), torch.full((300,), 0.37))


def test_plain_scales_are_given_back_as_they_are():
    scales = torch.rand(5)
    assert decode_scales(StoredScales(scales)) is scales


def test_parts_that_do_not_fit_are_all_named():
    weight = ops.quantize_4bit(torch.randn(4, 100))
    with pytest.raises(
        KernelError, match=r"HB405.*codes is torch.uint8 \(10,\), expected torch.uint8 \(200,\)"
    ):
        dataclasses.replace(weight, codes=weight.codes[:10])
    with pytest.raises(KernelError, match=r"(?s)codes.*scales"):
        dataclasses.replace(weight, shape=(4, 10_000))
    with pytest.raises(KernelError, match="HB405.*parts"):
        dataclasses.replace(weight, offset=None)


def test_a_wrong_specification_is_refused_with_the_choices():
    with pytest.raises(KernelError, match="nf4, fp4"):
        QuantSpec(format="nf3")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r"(?s)scales is 'best'.*blocksize is 7"):
        QuantSpec(scales="best", blocksize=7)  # type: ignore[arg-type]


def test_a_looked_up_code_is_the_one_that_a_search_finds():
    values = torch.from_numpy(dynamic_map().copy())
    edges = (values[1:] + values[:-1]) / 2
    around = [torch.nextafter(edges, torch.full_like(edges, end)) for end in (-2.0, 2.0)]
    every_upper_half = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    random = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = random[: 1 << 18] * torch.logspace(-12, 0, 1 << 18)
    for numbers in (edges, *around, values, every_upper_half, random, small):
        finite = numbers[torch.isfinite(numbers)]
        assert torch.equal(nearest_codes(finite).int(), torch.bucketize(finite, edges, out_int32=True))
