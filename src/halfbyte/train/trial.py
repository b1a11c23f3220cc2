"""One step on the largest batch a run can have, before the long work: what does not fit into memory shows at once.

It owns that trial, which leaves no trace in the weights, and how too little memory is told; it must not know what a
run does afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.errors import TrainError
from halfbyte.system import give_back_freed_memory
from halfbyte.train.deviation import Deviation, deviation
from halfbyte.train.metrics import peak_rss_bytes
from halfbyte.train.optimizer import build_optimizer, set_learning_rate
from halfbyte.train.paging import Discarded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch
    from halfbyte.settings import TrainConfig
    from halfbyte.train.step import StepLoss


@dataclass(frozen=True)
class Trial:
    """What one step took.

    Args:
        tokens: Tokens of its batch, without padding.
        seconds: Wall time.
        peak_rss_bytes: Largest resident memory of the process so far; None where the system does not say.
        deviation: What layers that keep in 8 bits change in its gradient; None where none does.
    """

    tokens: int
    seconds: float
    peak_rss_bytes: int | None
    deviation: Deviation | None = None


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Tell what there was too little memory for.

    Args:
        what: What is done within the block.

    Raises:
        TrainError: HB513 in place of the errors with which Python and PyTorch run out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        raise TrainError(
            "HB513",
            f"there is too little memory for {what}: {str(error) or type(error).__name__}",
            fix="lower train.batch_size (or batch_tokens), evaluate.batch_size, data.max_length or "
            "train.activation_memory_gb; more gradient_accumulation_steps keep the step as large",
        ) from error


def try_step(
    model: PreTrainedModel,
    batch: Batch,
    config: TrainConfig,
    loss: StepLoss,
    autocast: torch.dtype | None = None,
) -> Trial:
    """Do one step at a learning rate of zero: weights and random numbers are as before, gradients and state are gone.

    Where layers keep in 8 bits, the batch's gradient is taken twice more, to see what that changes.

    Args:
        model: In training mode.
        batch: The largest there is.
        config: Settings of the training.
        loss: What is minimised.
        autocast: Computing dtype where it differs from the weights', else None.

    Raises:
        TrainError: HB513 where memory does not suffice.
    """
    device = next(model.parameters()).device.type
    began = time.perf_counter()
    what = f"a step on the largest batch, {batch.tokens:,} tokens in {len(batch.documents):,} rows"

    def take() -> None:
        with torch.autocast(device, autocast) if autocast else nullcontext():
            share = loss.share(model, batch, max(1, batch.trained_tokens))
        share.objective.backward()  # type: ignore[no-untyped-call]

    with torch.random.fork_rng(devices=[]), enough_memory(what):
        take()
        optimizer = build_optimizer(model, config, Discarded)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()  # of any gradient, not finite ones too, nothing may reach the weights
        set_learning_rate(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del optimizer
        give_back_freed_memory()
        seconds = time.perf_counter() - began
        return Trial(batch.tokens, seconds, peak_rss_bytes(), deviation(model, take))
