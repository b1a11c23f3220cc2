"""What a run has to do, as a forecast needs to know it: its largest pass, how many passes and steps, and its model's
sizes.

It owns these two counts; it must not know memory, time or hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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

    from halfbyte.data.pack import Batch
    from halfbyte.settings import Config


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        largest: The pass that needs most memory; its token ids are zero.
        steps: Optimizer steps.
        passes_per_step: Forward and backward passes of each.
        tokens_per_pass: On average, padding included.
        trained_share: Of the tokens.
        row_tokens: Tokens of a row that attend to one another, on average over tokens.
    """

    largest: Batch
    steps: int
    passes_per_step: int
    tokens_per_pass: float
    trained_share: float
    row_tokens: float

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
        usage = Usage.of(plan.order)
        filled = float(tokens.sum()) / usage.passes
        return cls(
            largest=pack(rows) if config.train.packing else collate(rows, 0),
            steps=plan.total_steps,
            passes_per_step=config.train.gradient_accumulation_steps,
            tokens_per_pass=filled if config.train.packing else filled / usage.fill,
            trained_share=trained_share,
            row_tokens=float((tokens.astype(np.float64) ** 2).sum() / tokens.sum()),
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
