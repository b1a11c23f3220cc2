"""The measured limits are limits: numbers that products and reads of memory do not exceed."""

from __future__ import annotations

import math
import time

import pytest
import torch

from halfbyte.errors import KernelError
from halfbyte.kernels import limits, native
from halfbyte.kernels.cpu.calls import native as compiled

pytestmark = pytest.mark.skipif(native.module() is None, reason="there is nothing compiled to measure")
MOOD = 2.0  # on a shared machine the same work may take this much longer the next moment


def test_without_compiled_kernels_the_measurement_is_refused(monkeypatch):
    monkeypatch.setattr("halfbyte.kernels.limits.module", lambda: None)
    with pytest.raises(KernelError, match="HB404"):
        limits.peak_flops(torch.float32)
    with pytest.raises(KernelError, match="HB404"):
        limits.read_bandwidth(1 << 20)


def test_every_instruction_set_counts_the_operations_it_does(isa):
    one, ten = (compiled().arithmetic(rounds, False, 1) for rounds in (1, 10))
    assert ten == 10 * one > 0
    assert compiled().arithmetic(10, False, 3) == 3 * ten


def test_no_product_is_faster_than_the_peak():
    x = torch.randn(512, 512)
    peak = limits.peak_flops(torch.float32)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        torch.mm(x, x)
        seconds.append(time.perf_counter() - begin)
    assert math.isfinite(peak)
    assert 2 * 512**3 / min(seconds) <= MOOD * peak


def test_memory_is_read_whole_and_at_a_finite_speed():
    memory = torch.arange(1000, dtype=torch.int64)
    assert compiled().read(memory.data_ptr(), memory.numel(), 3) == 999 * 500
    bandwidth = limits.read_bandwidth(1 << 24)
    assert 1e8 < bandwidth < 1e13
