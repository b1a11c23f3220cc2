"""The learning-rate schedule as a pure function from step to factor.

It owns warm-up and decay; it knows nothing of optimizers, models or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# What becomes of the factor over the steps after warm-up, by progress in [0, 1).
DECAYS: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Number of warm-up steps: the ratio of all steps, rounded up, never all of them.

    Args:
        total_steps: Optimizer steps of the run, at least 1.
        warmup_ratio: Share of the steps to warm up over, in [0, 1].
    """
    return min(math.ceil(total_steps * warmup_ratio), total_steps - 1)


def learning_rate_factor(step: int, total_steps: int, warmup: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by at one step.

    Warm-up rises as (step + 1) / (warmup + 1), so that no step has a rate of zero and the first step
    after warm-up has the peak; then the decay runs over the remaining steps and would reach its end one
    step after the last.

    Args:
        step: Optimizer step, 0 to total_steps - 1.
        total_steps: Optimizer steps of the run.
        warmup: Warm-up steps, less than total_steps.
        schedule: A key of `DECAYS`.

    Returns:
        Factor in (0, 1].
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return DECAYS[schedule]((step - warmup) / (total_steps - warmup))
