"""What a model accepts: which token ids, how many of them in a row, and which rows go beyond that.

It owns the comparison of rows with a model's shape; it must not know files, training or evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from halfbyte.data.tokenise import Example
from halfbyte.errors import DataError, listed
from halfbyte.model.inputs import first_position


@dataclass(frozen=True)
class Limits:
    """The bounds of a model.

    Args:
        vocabulary: Token ids it reads are below this.
        outputs: Token ids it can predict are below this.
        positions: Longest sequence its positions were made for; None where its settings name none.
    """

    vocabulary: int
    outputs: int
    positions: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Limits:
        """The bounds of a model; weights without memory will do."""
        config = model.config.get_text_config()
        embedding = getattr(model.get_input_embeddings(), "weight", None)
        head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[no-untyped-call]
        positions = getattr(config, "max_position_embeddings", None)
        vocabulary = len(embedding) if embedding is not None else int(config.vocab_size)
        return cls(
            vocabulary,
            len(head) if head is not None else vocabulary,
            positions - first_position(model) if isinstance(positions, int) and positions > 0 else None,
        )

    def hold(self, lowest: int, highest: int, longest: int) -> bool:
        """Whether all rows fit that have no ids but these and those between, and no more tokens than the longest."""
        fits = self.positions is None or longest <= self.positions
        return fits and lowest >= 0 and highest < min(self.vocabulary, self.outputs)

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse rows that the model cannot be given, or cannot be asked for.

        Raises:
            DataError: HB213 for token ids beyond the vocabulary, HB212 for rows longer than its positions; each
                names every such row.
        """
        _refuse(
            "HB213",
            [(e, _strange_ids(e, self)) for e in examples],
            f"hold ids outside of the model's {self.vocabulary:,} tokens"
            + (f", {self.outputs:,} of which it can predict" if self.outputs != self.vocabulary else ""),
            "use the tokenizer the model came with, or a folder of the model that was resized for this one",
        )
        if self.positions is not None:
            context = self.positions
            _refuse(
                "HB212",
                [(e, f"it has {e.longest:,} tokens" if e.longest > context else "") for e in examples],
                f"are longer than the model's context of {context:,} tokens",
                f"set data.max_length to {context} or less",
            )


def _refuse(code: str, found: Sequence[tuple[Example, str]], what: str, fix: str) -> None:
    """Raise with every row that has a fault, if there is one."""
    faults = [f"{example.where}: {fault}" for example, fault in found if fault]
    if faults:
        raise DataError(code, f"{len(faults)} of {len(found)} rows {what}" + listed(faults), fix=fix)


def _strange_ids(example: Example, limits: Limits) -> str:
    """The ids of a row that the model has no embedding or no output for, in words; "" for none."""
    prompt = example.prompt_ids if example.prompt_ids is not None else example.input_ids[:0]
    ids = np.concatenate([example.input_ids, prompt])
    if ids.min(initial=0) >= 0 and ids.max(initial=0) < min(limits.vocabulary, limits.outputs):
        return ""
    targets = example.input_ids[example.trained]
    strange = np.union1d(
        ids[(ids < 0) | (ids >= limits.vocabulary)], targets[(targets < 0) | (targets >= limits.outputs)]
    )
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    named = ", ".join(map(str, strange[:5].tolist()))
    return f"it holds the ids {named}{more}" if len(strange) else ""
