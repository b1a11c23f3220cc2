"""The learning-rate schedule as a pure function from step to factor.

It owns warm-up and decay; it knows nothing of optimizers, models or clocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.settings import TrainConfig

WSD_DECAY_RATIO = 0.1


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# What becomes of the factor over the steps that decay, by progress in [0, 1).
DECAYS: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _cosine,
}


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """Number of warm-up steps: those set, or the ratio of all steps, rounded up; never all of them.

    Args:
        total_steps: Optimizer steps of the run, at least 1.
        config: Warm-up steps or ratio.
    """
    wanted = config.warmup_steps
    if wanted is None:
        wanted = math.ceil(total_steps * config.warmup_ratio)
    return min(wanted, total_steps - 1)


def decay_steps(total_steps: int, warmup: int, config: TrainConfig) -> int:
    """Number of steps that decay, the last ones: all after the warm-up, or as many of them as wsd is given.

    Args:
        total_steps: Optimizer steps of the run.
        warmup: Warm-up steps, less than total_steps.
        config: Schedule and decay ratio.

    Returns:
        At least 1.
    """
    after_warmup = total_steps - warmup
    if config.schedule != "wsd":
        return after_warmup
    return min(math.ceil(total_steps * (config.decay_ratio or WSD_DECAY_RATIO)), after_warmup)


def learning_rate_factor(step: int, total_steps: int, warmup: int, config: TrainConfig) -> float:
    """What the peak learning rate is multiplied by at one step.

    Warm-up rises as (step + 1) / (warmup + 1), so that no step has a rate of zero and the first step
    after warm-up has the peak; then the decay runs over its steps and would reach its end one step after the
    last.

    Args:
        step: Optimizer step, 0 to total_steps - 1.
        total_steps: Optimizer steps of the run.
        warmup: Warm-up steps, less than total_steps.
        config: Schedule, decay ratio and the share of the peak at which the decay ends.

    Returns:
        Factor in (0, 1].

    Source: wsd is Hu et al., MiniCPM (2024), section 4.2, with the decay that transformers gives it.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    decaying = decay_steps(total_steps, warmup, config)
    progress = max(0, step - (total_steps - decaying)) / decaying
    lowest = config.min_lr_ratio
    return lowest + (1.0 - lowest) * DECAYS[config.schedule](progress)
