"""How fast this machine can be at best, measured: arithmetic on registers alone, and reading memory.

It owns these two measurements, against which kernels are judged; it must not know any operation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import torch

from halfbyte.errors import KernelError
from halfbyte.kernels.native import BACKEND_VARIABLE, module

_SECONDS = 0.05  # of one measurement: long beside the start of threads, short beside a clock's mood


def peak_flops(dtype: torch.dtype) -> float:
    """Operations per second of products in registers on all of torch's threads, the best of several.

    Args:
        dtype: bfloat16 for products of bf16 pairs where the instruction set in use has them; else float32 counts.

    Returns:
        Floating-point operations per second; a product and its sum are two.

    Raises:
        KernelError: HB404 without the compiled module.
    """
    native = _native()
    pairs = dtype == torch.bfloat16 and native.active().endswith("bf16")
    rounds = 1000

    def operations() -> float:
        return float(native.arithmetic(rounds, pairs, torch.get_num_threads()))

    while _timed(operations)[0] < _SECONDS:
        rounds *= 2
    return max(done / seconds for seconds, done in (_timed(operations) for _ in range(9)))


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per second at which all of torch's threads read memory, the best of several passes.

    Args:
        nbytes: Size of the memory read, far beyond every cache.

    Raises:
        KernelError: HB404 without the compiled module.
    """
    native = _native()
    memory = torch.ones(nbytes // 8, dtype=torch.int64)

    def read() -> float:
        native.read(memory.data_ptr(), memory.numel(), torch.get_num_threads())
        return float(memory.nbytes)

    return max(done / seconds for seconds, done in (_timed(read) for _ in range(5)))


def _timed(work: Callable[[], float]) -> tuple[float, float]:
    begin = time.perf_counter()
    done = work()
    return time.perf_counter() - begin, done


def _native() -> ModuleType:
    native = module()
    if native is None:
        what = "there are no compiled kernels to measure this machine with"
        raise KernelError("HB404", what, fix=f"build them, or unset {BACKEND_VARIABLE}")
    return native
