"""How fast AdamW steps with its state in 8 bits, beside memory's pace, torch's fused AdamW and bitsandbytes'.

It owns the sizes measured; it must not know how anything is computed.

    python bench/optimizer.py [--quick]

Bytes that a step must move for each number: parameter read and written (8), gradient read (4), both codes read and
written (4), scales (0.06). Their pace is held against the pace at which the same threads read memory in the same run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bitsandbytes
import torch

from figures import Figure, run
from halfbyte.kernels.limits import read_bandwidth
from halfbyte.train.adamw import SmallAdamW
from halfbyte.train.optimizer import state_bytes
from halfbyte.train.paging import PageFile

NUMBERS = 64 << 20
BYTES_MOVED = 8 + 4 + 4 + 2 * 2 * 4 / 256
BANDWIDTH_FLOOR, STATE_CEILING, TORCH_FLOOR = 0.6, 2.1, 0.5
ADAPTER = [16 * 4096] * 448  # matrices of rank 16, as beside 7 layers of 32 blocks


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    rounds, count = (5, NUMBERS // 4) if quick else (15, NUMBERS)
    where = f"{count / 2**20:.0f} Mi numbers, {torch.get_num_threads()} threads"
    sides: dict[str, Callable[[], object]] = {
        "adamw_8bit": _step(count, partial(SmallAdamW, bits=8)),
        "torch": _step(count, partial(torch.optim.AdamW, fused=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    reads = []
    for _ in range(rounds):  # in turn, memory's pace too: a busy machine is equally unkind to all
        reads.append(read_bandwidth(1 << 28))
        for name, side in sides.items():
            seconds[name].append(_timed(side))
    ours, torchs = (statistics.median(times) for times in seconds.values())
    shares = [BYTES_MOVED * count / s / read for s, read in zip(seconds["adamw_8bit"], reads, strict=True)]
    yield Figure(f"memory read, {where}", statistics.median(reads) / 1e9, "GB/s")
    yield Figure(f"adamw_8bit, {where}", BYTES_MOVED * count / ours / 1e9, "GB/s")
    yield Figure.at_least(
        f"adamw_8bit, {where}: share of memory's pace", statistics.median(shares), "x", BANDWIDTH_FLOOR
    )
    yield Figure.at_least(
        f"adamw_8bit, {where}: torch's fused AdamW over it", torchs / ours, "x", TORCH_FLOOR
    )
    told = state_bytes("adamw_8bit", [count])
    yield Figure.at_most("adamw_8bit: state per number", told.memory / count, "bytes", STATE_CEILING)
    adapter = state_bytes("paged_adamw_8bit", ADAPTER)
    per_number = (adapter.memory + adapter.disk) / sum(ADAPTER)
    yield Figure.at_most("paged_adamw_8bit, rank 16: state per number", per_number, "bytes", STATE_CEILING)
    yield from _beside_bitsandbytes(count // 8)
    yield from _paged(count, rounds)


def _beside_bitsandbytes(count: int) -> Iterator[Figure]:
    ours = _step(count, partial(SmallAdamW, bits=8))
    theirs = _step(count, bitsandbytes.optim.AdamW8bit)
    pairs = [(_timed(ours), _timed(theirs)) for _ in range(3)]
    mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
    yield Figure.at_least(
        f"adamw_8bit, {count / 2**20:.0f} Mi numbers: bitsandbytes over it", other / mine, "x", 1.0
    )


def _paged(count: int, rounds: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for bits in (8, 32):
            paged = _step(count, partial(SmallAdamW, bits=bits, pages=partial(PageFile, Path(folder))))
            seconds = statistics.median(_timed(paged) for _ in range(min(rounds, 5)))
            disk = state_bytes("paged_adamw_8bit" if bits == 8 else "paged_adamw", [count]).disk
            yield Figure(f"paged, {bits} bits, {count / 2**20:.0f} Mi numbers: a step", seconds, "s")
            yield Figure(f"paged, {bits} bits: pages read and written", 2 * disk / seconds / 1e9, "GB/s")


def _step(count: int, make: Callable[..., torch.optim.Optimizer]) -> Callable[[], object]:
    """A step of an optimizer over one parameter, its state made."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(count))
    parameter.grad = 1e-3 * torch.randn(count)
    optimizer = make([parameter], lr=1e-4, weight_decay=0.01)
    for _ in range(2):
        optimizer.step()
    return optimizer.step


def _timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(run("optimizer", measure))
