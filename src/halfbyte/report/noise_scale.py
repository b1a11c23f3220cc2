"""Whether a larger or a smaller step would help, from what the steps of a run showed of their gradients' noise.

It owns which steps count, the estimate and its words; it must not know how a step is measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.evaluate.statistics import Interval, ratio_of_means

LEAST = 8
"""Steps below which nothing is said."""
ABOUT = 4.0
"""An interval that holds 1 and lies within this factor of it means that the step is about right."""


def noise_scale(metrics: Path) -> Interval | None:
    """The simple noise scale, counted in steps of the run's size.

    The later half of the measured steps counts, since the noise scale grows while the loss falls. At a noise scale of
    1 a step of that size needs twice the steps that one over all rows would, and twice the rows that the
    smallest would.

    Args:
        metrics: metrics.jsonl of a run.

    Returns:
        None where fewer than 8 steps were measured in that half: those of a single micro-batch are not.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), sections 2.2 and A.1.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = [
        (line["grad_variance"], line["grad_signal"])
        for line in lines
        if line.get("grad_variance") is not None
    ]
    later = found[len(found) // 2 :]
    if len(later) < LEAST:
        return None
    return ratio_of_means(*zip(*later, strict=True))


def advice(noise: Interval) -> str:
    """What to do about the size of a step, with what it rests on, in a sentence."""
    if noise.high == float("inf"):
        told = f"at least {noise.low:.2g}" if noise.low > 0 else "unknown"
    else:
        told = f"{noise.value:.2g}, 95 % interval {noise.low:.2g} to {noise.high:.2g}"
    basis = f"noise scale in steps: {told}, from {noise.n} steps"
    more = "gradient_accumulation_steps"
    if noise.low > 1:
        open_ended = noise.high == float("inf")
        times = f"{noise.low:.2g} or more" if open_ended else f"up to about {noise.value:.2g}"
        said = f"a larger step would help, of {times} times the rows (train.{more})"
    elif noise.high < 1:
        said = f"a smaller step would learn more from each row (train.{more}, train.batch_size)"
    elif noise.low >= 1 / ABOUT and noise.high <= ABOUT:
        said = "the step is about as large as its noise asks for"
    else:
        said = "whether a larger or a smaller step would help cannot be told"
    return f"{said}; {basis}"
