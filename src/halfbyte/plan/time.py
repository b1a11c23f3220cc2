"""How long a step takes: from passes that were timed on this machine, or from a peak and how much of it is reached.

It owns the count of operations and how times add up; it must not know memory, or how anything is measured.

Shapes: P numbers of the frozen layers, N of the adapters, V · C of the head, a numbers of a token's queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from halfbyte.plan.terms import Estimate
from halfbyte.plan.work import Sizes, Work

EFFICIENCY = (0.35, 0.55, 0.75)
"""Share of its peak that a machine reaches which was not measured: least, likely, most. Streamed steps were seen at
0.68 to 1.0 of what products alone reach, and these at 0.5 to 0.8 of a data sheet's peak."""

MEASURED_SPREAD = 0.1
"""How far a time that was put together from timed passes may be off: clocks move by as much."""

ADAMW_BYTES = 40
"""Read and written per number that trains: the norm, clipping, gradient, weight and both moments."""


class Timing(NamedTuple):
    """What passes of one shape took.

    Attributes:
        tokens: Of the pass.
        row_tokens: Tokens that attended to one another.
        layers: Seconds of a layer, forward and backward, by what it keeps.
        rest: Seconds of all that is not in layers: embedding, head and loss, per pass.
    """

    tokens: int
    row_tokens: float
    layers: Mapping[str, float]
    rest: float


class Speeds(NamedTuple):
    """How fast a machine is.

    Attributes:
        flops: Operations per second that products reach at best.
        memory_bytes_per_s: Reading memory.
        read_bytes_per_s: Reading files that are not cached.
        write_bytes_per_s: Writing files.
        direct_bytes_per_s: Reading files past the system's cache, as a base is that the cache cannot hold.
    """

    flops: float
    memory_bytes_per_s: float
    read_bytes_per_s: float | None
    write_bytes_per_s: float | None
    direct_bytes_per_s: float | None


def operations(sizes: Sizes, work: Work, trainable: int, method: str, keeps: Mapping[str, int]) -> float:
    """Floating-point operations of a step.

    Args:
        sizes: Of the model.
        work: What a step has to do.
        trainable: Numbers that train.
        method: full, lora or qlora.
        keeps: How many layers keep what; those that keep their input alone are computed again.
    """
    again = keeps.get("input", 0) / max(1, sum(keeps.values()))
    whole = method == "full"
    linear = sizes.linear * (6 if whole else 4 + 2 * again)
    head = sizes.head * work.trained_share * (6 if whole else 4)
    branches = 0 if whole else trainable * (6 + 2 * again)
    attention = sizes.layers * (7 + 2 * again) * work.row_tokens * sizes.attention
    return work.passes_per_step * work.tokens_per_pass * (linear + head + branches + attention)


def layer_work(sizes: Sizes, tokens: float, row_tokens: float) -> float:
    """What a layer's time grows with: its products, and attention's."""
    return tokens * (4 * sizes.linear / max(1, sizes.layers) + 7 * row_tokens * sizes.attention)


def from_timing(timing: Timing, sizes: Sizes, work: Work, keeps: Counter[str]) -> float:
    """Seconds of a step's passes, from passes that were timed."""
    grown = layer_work(sizes, work.tokens_per_pass, work.row_tokens) / layer_work(
        sizes, timing.tokens, timing.row_tokens
    )
    layers = sum(count * timing.layers[keep] for keep, count in keeps.items()) * grown
    rest = timing.rest * work.tokens_per_pass / timing.tokens * work.trained_share
    return work.passes_per_step * (layers + rest)


def with_streaming(seconds: float, sizes: Sizes, work: Work, layer_bytes: float, read: float) -> float:
    """A step's passes with every layer read twice in each, behind the one that computes: forward is a third."""
    visits = sizes.layers * work.passes_per_step
    compute = seconds / max(1, visits)
    reading = layer_bytes / read
    return visits * (max(compute / 3, reading) + max(compute * 2 / 3, reading)) + reading


def of_optimizer(trainable: int, speeds: Speeds) -> float:
    """Seconds of clipping and the update."""
    return trainable * ADAMW_BYTES / speeds.memory_bytes_per_s


def estimate(seconds: float, *, measured: bool, source: str, date: str) -> Estimate:
    """Seconds with their interval."""
    if measured:
        low, high = seconds * (1 - MEASURED_SPREAD), seconds * (1 + MEASURED_SPREAD)
        return Estimate("s", low, seconds, high, "calibrated", source, date)
    least, likely, most = EFFICIENCY
    method = f"{likely:.0%} ({least:.0%} to {most:.0%}) of the peak"
    return Estimate("s", seconds / most, seconds / likely, seconds / least, method, source, date)
