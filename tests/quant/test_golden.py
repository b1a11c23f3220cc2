"""Weights quantised elsewhere dequantise to the bits that bitsandbytes' own CUDA kernel gave."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from halfbyte.kernels import ops
from halfbyte.quant.weight import Weight4bit

GOLDEN = ("phi3_5_mini_nf4_dq.bin", "qwen2_5_1_5b_nf4_dq.bin", "qwen3_mcqa_fp4.bin")


def read_golden(path: Path) -> tuple[Weight4bit, torch.Tensor]:
    """A weight and its expected bfloat16 values; the layout is described beside the files."""
    data = path.read_bytes()
    kind, count, blocksize, *lengths = struct.unpack_from("<9I", data)
    (offset,) = struct.unpack_from("<f", data, 36)
    nested = kind == 2
    dtypes = ("u1", "u1" if nested else "<f4", "<f4", "<f4", "<f4", "<i2")
    arrays, position = [], 40
    for length, dtype in zip(lengths, dtypes, strict=True):
        arrays.append(torch.from_numpy(np.frombuffer(data[position : position + length], dtype).copy()))
        position += length
    codes, scales, codebook, nested_scales, nested_codebook, expected = arrays
    weight = Weight4bit(
        codes=codes,
        scales=scales,
        codebook=codebook,
        shape=(1, count),
        dtype=torch.bfloat16,
        format="nf4" if codebook[0] == -1 else "fp4",
        blocksize=blocksize,
        nested_scales=nested_scales if nested else None,
        nested_codebook=nested_codebook if nested else None,
        offset=torch.tensor(offset) if nested else None,
    )
    return weight, expected.view(torch.bfloat16)


def differing_bits(got: torch.Tensor, expected: torch.Tensor) -> int:
    """How many values differ, the sign of zero aside."""
    differs = got.view(torch.int16) != expected.view(torch.int16)
    return int((differs & ~((got == 0) & (expected == 0))).sum())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_dequantise_bit_for_bit(shared, name, backend):
    weight, expected = read_golden(shared(f"golden_nf4/{name}"))
    assert differing_bits(ops.dequantize_4bit(weight).flatten(), expected) == 0


def test_the_comparison_can_fail(shared):
    weight, expected = read_golden(shared(f"golden_nf4/{GOLDEN[0]}"))
    weight.codes[7] ^= 0x10
    assert differing_bits(ops.dequantize_4bit(weight).flatten(), expected) == 1
