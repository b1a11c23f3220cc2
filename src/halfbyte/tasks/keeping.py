"""What the layers of a task's model keep for the backward pass, of the memory that a run has.

It owns the question of how much that is; it must not know how layers are counted or how they keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.model import blocks
from halfbyte.system import available_bytes
from halfbyte.train.memory import activation_budget_bytes
from halfbyte.train.optimizer import to_come_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.model.keep import KeepPlan
    from halfbyte.model.speeds import Speeds
    from halfbyte.tasks.task import Task


def choose_kept(
    task: Task[Any],
    model: PreTrainedModel,
    earlier: list[str] | None = None,
    *,
    room: int | None = None,
    speeds: Speeds | None = None,
) -> tuple[KeepPlan | None, int]:
    """Have layers keep what memory allows at the largest batch.

    Args:
        task: Its settings and rows.
        model: With its adapters.
        earlier: What they kept in the run that is gone on with, where that decides the numbers.
        room: Bytes that they may hold as they were forecast; less is taken only where it is not there any more. None
            where nothing was forecast.
        speeds: Of arithmetic and disk as they were forecast; None measures them where they decide.

    Returns:
        The choice, None for a model without fused layers; and the largest batch's tokens.
    """
    tokens, config = task.plan().order.most_tokens, task.config
    to_come, given = to_come_bytes(model, config.train), config.train.activation_memory_gb
    if room is None:
        budget = activation_budget_bytes(given, config.memory_gb, to_come)
    else:
        budget = room if given is not None else min(room, max(0, available_bytes() - to_come))
    folder = Path(config.output_dir)
    plan = blocks.plan_memory(
        model,
        tokens,
        budget,
        activations=config.train.activations,
        folder=folder,
        speeds=speeds,
        earlier=earlier,
    )
    return plan, tokens
