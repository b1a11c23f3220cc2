"""What a run has to do, as a forecast needs to know it: its largest pass, how many passes and steps, and its model's
sizes.

It owns these two counts; it must not know memory, time or hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.order import Usage
from halfbyte.data.pack import collate, pack
from halfbyte.data.tokenise import Example
from halfbyte.model.blocks import repeated_layers
from halfbyte.model.skeleton import build_skeleton
from halfbyte.plan.loaded import open_for_plan, weights_of
from halfbyte.train.plan import Plan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch
    from halfbyte.model.purpose import Head
    from halfbyte.settings import Config
    from halfbyte.tasks.task import Task
    from halfbyte.train.step import StepLoss


@dataclass(frozen=True)
class Largest:
    """The pass of a run that needs most memory, and what is done with it.

    Attributes:
        batch: Its rows.
        loss: What a step minimises; None is the loss of tokens, as the settings have it.
        head: What stands on an encoder; None for a model that writes.
        measure: Does the largest pass of measuring, and drops what comes out; None where nothing is measured.
    """

    batch: Batch
    loss: StepLoss | None = None
    head: Head | None = None
    measure: Callable[[PreTrainedModel], None] | None = None


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        largest: The pass that needs most memory.
        steps: Optimizer steps.
        passes_per_step: Forward and backward passes of each.
        tokens_per_pass: On average, padding included.
        trained_share: Of the tokens.
        row_tokens: Tokens of a row that attend to one another, on average over tokens.
        untimed: Why its time cannot be forecast; empty where it can.
    """

    largest: Largest
    steps: int
    passes_per_step: int
    tokens_per_pass: float
    trained_share: float
    row_tokens: float
    untimed: str = ""

    @classmethod
    def of(
        cls, lengths: Sequence[int] | NDArray[np.int64], config: Config, trained_share: float = 1.0
    ) -> Work:
        """The work of rows of some lengths.

        Args:
            lengths: Tokens of each row.
            config: Settings of the run.
            trained_share: Of the tokens, those that carry loss.

        Raises:
            ConfigError: HB102 where `batch_tokens` does not hold the longest row.
            DataError: HB203 without rows.
        """
        tokens = np.minimum(np.asarray(lengths, np.int64), config.data.max_length)
        plan = Plan.of(tokens, config.train, config.seed)
        rows = [_example(int(tokens[row]), trained_share) for row in plan.order.largest]
        largest = Largest(pack(rows) if config.train.packing else collate(rows, 0))
        return cls._of(largest, plan, tokens, config, trained_share=trained_share)

    @classmethod
    def of_task(cls, task: Task[Any], *, measured: bool = False) -> Work:
        """The work of a task whose rows are prepared.

        Args:
            task: Its settings and rows.
            measured: Whether its held-out rows are measured too.

        Raises:
            ConfigError: HB102 where `batch_tokens` does not hold the longest row.
            DataError: HB203 without rows.
        """
        config, rows, plan = task.config, task.rows.train, task.plan()
        examples = [rows[task.members * unit + k] for unit in plan.order.largest for k in range(task.members)]
        side_by_side = pack if config.train.packing else partial(collate, pad_id=task.pad_id)
        batch = (task.collate or side_by_side)(examples)
        trained, tokens = task.facts().get("trained_tokens"), rows.lengths
        share = trained / int(tokens.sum()) if isinstance(trained, int) else 1.0
        measure = task.measured_pass if measured and len(task.rows.held_out) else None
        largest = Largest(batch, task.loss_without_reference, task.trained_head, measure)
        untimed = "" if task.is_timed else f"the time of a step of task {config.task} is not forecast"
        return cls._of(largest, plan, tokens, config, trained_share=share, untimed=untimed)

    @classmethod
    def _of(
        cls,
        largest: Largest,
        plan: Plan,
        tokens: NDArray[np.int64],
        config: Config,
        *,
        trained_share: float,
        untimed: str = "",
    ) -> Work:
        usage = Usage.of(plan.order)
        filled = float(tokens.sum()) / usage.passes
        return cls(
            largest=largest,
            steps=plan.total_steps,
            passes_per_step=config.train.gradient_accumulation_steps,
            tokens_per_pass=filled if config.train.packing else filled / usage.fill,
            trained_share=trained_share,
            row_tokens=float((tokens.astype(np.float64) ** 2).sum() / tokens.sum()),
            untimed=untimed,
        )


def _example(tokens: int, trained_share: float) -> Example:
    trained = np.zeros(tokens, bool)
    trained[-max(2, math.ceil(trained_share * tokens)) :] = True
    return Example(np.zeros(tokens, np.int32), trained, None, None, "", "", truncated=False)


class Sizes(NamedTuple):
    """The sizes of a model.

    Attributes:
        layers: How many there are.
        linear: Numbers of the linear layers of all of them.
        head: Numbers of the output head.
        others: All other numbers: norms, and an embedding that is not the head's too.
        hidden: Width of the stream.
        attention: Numbers of a token's queries.
        stored_bytes: Of the weights in their files, where there are such.
    """

    layers: int
    linear: int
    head: int
    others: int
    hidden: int
    attention: int
    stored_bytes: int

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return self.linear + self.head + self.others

    @classmethod
    def of(cls, model: str, dtype: torch.dtype) -> Sizes:
        """The sizes of a model folder or a bare config.json."""
        folder = open_for_plan(model)
        skeleton = build_skeleton(folder, dtype)
        weights = weights_of(folder, skeleton)
        config = skeleton.config.get_text_config()
        heads = int(getattr(config, "num_attention_heads", 1))
        hidden = int(getattr(config, "hidden_size", 1))
        of_head = getattr(skeleton.get_output_embeddings(), "weight", None)  # type: ignore[no-untyped-call]
        linear = sum(w.count for w in weights if w.slot.linear is not None)
        head = 0 if of_head is None else of_head.numel()
        total = sum(w.count for w in weights)
        return cls(
            layers=len(repeated_layers(skeleton)),
            linear=linear,
            head=head,
            others=total - linear - head,
            hidden=hidden,
            attention=heads * int(getattr(config, "head_dim", None) or hidden // heads),
            stored_bytes=sum(tensor.nbytes for tensor in folder.tensors.values()),
        )
