"""Products against what the machine can do at best, measured in the same rounds, beside bitsandbytes and torch.

It owns the shapes and the floors; it must not know how a product is computed.

    python bench/kernels.py [--quick]

The peak is products in registers alone, the bandwidth is reading memory far beyond the caches. `HALFBYTE_ISA`
limits the instruction set; the floors are those of AVX-512-BF16 on two cores and are printed as missed below it.
Without AVX-512-BF16 the peak is that of float32 products.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from figures import Figure, run, time_sides
from halfbyte.kernels import ops
from halfbyte.kernels.cpu.calls import native, threads
from halfbyte.kernels.linear import linear, linear_grad
from halfbyte.kernels.terms import Product, Term
from halfbyte.quant.weight import Weight4bit

FLOORS = {64: 0.65, 512: 0.85}  # rows -> share of the peak
BANDWIDTH_FLOOR = 0.8
ROW_FLOOR = 1.0
"""Times bitsandbytes. Its kernel of inference reads the weight once too, so that memory bounds both alike."""
SIZE = 4096
FEW = (1, 2, 4, 8)


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    yield from products(SIZE // 2 if quick else SIZE, rounds=5 if quick else 15)
    yield from rows(8192, 8192 if quick else 28672, rounds=5 if quick else 15)


def products(size: int, rounds: int) -> Iterator[Figure]:
    """Forward and input gradient at training sizes."""
    weight, dense = _weight(size, size)
    name = f"NF4 {size} x {size} bfloat16, {native().active()}, {torch.get_num_threads()} threads"
    for M, floor in FLOORS.items():
        x = _random(M, size, 1)
        operations = 2 * M * size * size
        pairs = native().active().endswith("bf16")
        burn = max(1, operations // int(native().arithmetic(1, pairs, threads())))
        product = [Product((Term(x, weight.parts()),))]
        seconds = time_sides(
            {
                "peak": lambda r=burn, p=pairs: native().arithmetic(r, p, threads()),
                "forward": lambda p=product: linear(p),
                "input gradient": lambda p=product: linear_grad(p),
                "torch": lambda x=x: torch.nn.functional.linear(x, dense),
            },
            rounds=rounds,
        )
        peak = int(native().arithmetic(1, pairs, threads())) * burn / seconds["peak"]
        yield Figure(f"{name}, {M} rows: peak", peak / 1e9, "GFLOP/s")
        for side in ("forward", "input gradient"):
            share = operations / seconds[side] / peak
            yield Figure.at_least(f"{name}, {M} rows: {side}, of the peak", share, "", floor)
        yield Figure(
            f"{name}, {M} rows: torch on the dense weight, of the peak",
            operations / seconds["torch"] / peak,
            "",
        )


def rows(N: int, K: int, rounds: int) -> Iterator[Figure]:
    """One to eight rows, as in generation: the weight is read once."""
    import bitsandbytes

    weight, dense = _weight(N, K)
    theirs = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    theirs.weight = bitsandbytes.nn.Params4bit(
        dense, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    theirs = theirs.to("cpu").eval()
    memory = torch.ones(1 << 27, dtype=torch.int64)
    name = f"NF4 {N} x {K} bfloat16, {native().active()}, {torch.get_num_threads()} threads"
    for M in FEW:
        x = _random(M, K, 1)
        sides = {
            "read": lambda: native().read(memory.data_ptr(), memory.numel(), threads()),
            "ours": lambda x=x: linear([Product((Term(x, weight.parts()),))]),
        }
        if M == 1:
            sides["bitsandbytes"] = lambda x=x: theirs(x)
        with torch.no_grad():
            seconds = time_sides(sides, rounds=rounds)
        bandwidth, ours = memory.nbytes / seconds["read"], weight.nbytes / seconds["ours"]
        share = ours / bandwidth
        claim = f"{name}, {M} rows: of the read bandwidth"
        if M == 1:
            yield Figure(f"{name}: read bandwidth", bandwidth / 1e9, "GB/s")
            yield Figure.at_least(claim, share, "", BANDWIDTH_FLOOR)
            ratio = seconds["bitsandbytes"] / seconds["ours"]
            yield Figure.at_least(f"{name}, 1 row: against bitsandbytes", ratio, "x", ROW_FLOOR)
        else:
            yield Figure(claim, share, "")


def _weight(N: int, K: int) -> tuple[Weight4bit, Tensor]:
    dense = _random(N, K, 0)
    return ops.quantize_4bit(dense), dense


def _random(rows: int, cols: int, seed: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


if __name__ == "__main__":
    sys.exit(run("kernels", measure))
