"""What the layers of a task's model keep for the backward pass, of the memory that a run has.

It owns the question of how much that is; it must not know how layers are counted or how they keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.model import blocks
from halfbyte.train.memory import activation_budget_bytes
from halfbyte.train.optimizer import to_come_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.model.keep import KeepPlan
    from halfbyte.tasks.task import Task


def choose_kept(
    task: Task[Any], model: PreTrainedModel, earlier: list[str] | None = None
) -> tuple[KeepPlan | None, int]:
    """Have layers keep what memory allows at the largest batch.

    Args:
        task: Its settings and rows.
        model: With its adapters.
        earlier: What they kept in the run that is gone on with, where that decides the numbers.

    Returns:
        The choice, None for a model without fused layers; and the largest batch's tokens.
    """
    tokens, config = task.plan().order.most_tokens, task.config
    budget = activation_budget_bytes(
        config.train.activation_memory_gb, config.memory_gb, to_come_bytes(model, config.train)
    )
    folder = Path(config.output_dir)
    plan = blocks.plan_memory(
        model, tokens, budget, activations=config.train.activations, folder=folder, earlier=earlier
    )
    return plan, tokens
