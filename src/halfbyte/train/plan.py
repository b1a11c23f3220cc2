"""How many steps a run has, and over which rows each of them goes.

It owns that count; it must not know models, losses or what a step does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.order import Order, order_of, passes_in
from halfbyte.train.schedule import warmup_steps

if TYPE_CHECKING:
    from halfbyte.data.examples import ExampleSet, Learnable
    from halfbyte.settings import TrainConfig


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, and over which rows each of them goes.

    Args:
        order: The rows of each pass.
        total_steps: Optimizer steps of the run.
        warmup: Steps of rising learning rate.
    """

    order: Order
    total_steps: int
    warmup: int

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.int64], config: TrainConfig, seed: int) -> Plan:
        """The plan for rows of some lengths; `max_steps` decides where it is set, else `epochs`.

        Raises:
            ConfigError: HB102 where `batch_tokens` does not hold the longest row.
            DataError: HB203 without rows.
        """
        order = order_of(lengths, config, seed)
        total = config.max_steps
        if total is None:
            whole = int(config.epochs)
            per_epoch = [
                math.ceil(passes_in(order, epoch) / config.gradient_accumulation_steps)
                for epoch in range(math.ceil(config.epochs))
            ]
            share = config.epochs - whole
            part = math.ceil(round(share * per_epoch[-1], 6)) if share else 0  # 2.1 is not a whole 2.1
            total = max(1, sum(per_epoch[:whole]) + part)
        return cls(order, total, warmup_steps(total, config))


def unit_lengths(examples: ExampleSet[Learnable], members: int) -> NDArray[np.int64]:
    """Tokens of each so many examples that are judged together, in order."""
    lengths: NDArray[np.int64] = examples.lengths.reshape(-1, members).sum(1)
    return lengths
