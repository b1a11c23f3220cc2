"""All that is measured of a model on one set of rows, as the settings ask for it.

It owns which measurements are made and their files; it must not know which model is measured, or why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.evaluate.perplexity import LossResult, Progress, held_out_loss
from halfbyte.evaluate.tasks import ExactMatchResult, exact_match, gradable, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.data.tokenise import Example
    from halfbyte.settings import EvaluateConfig


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        stop_ids: Token ids that end an answer.
        pad_id: Token id to fill short rows with; masked, so its value is free.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]
    pad_id: int


@dataclass(frozen=True)
class Measurement:
    """What came out; None for what was not asked for or cannot be measured on these rows.

    Args:
        loss: Held-out loss and perplexity.
        answers: Generated answers and exact matches.
    """

    loss: LossResult | None
    answers: ExactMatchResult | None

    def described(self) -> str:
        """What was measured in a few words."""
        words = []
        if self.loss is not None:
            words += [f"loss {self.loss.loss.value:.3f}", f"perplexity {self.loss.perplexity.value:,.2f}"]
        if self.answers is not None:
            right = sum(item.correct for item in self.answers.items)
            words.append(f"exact match {right} of {len(self.answers.items)}")
        return ", ".join(words) or "no held-out rows: nothing is measured"

    def write(self, folder: Path, name: str) -> None:
        """Write one line per item to `<name>.loss.jsonl` and `<name>.answers.jsonl`, each if measured."""
        if self.loss is not None:
            write_records(folder / f"{name}.loss.jsonl", self.loss.items)
        if self.answers is not None:
            write_records(folder / f"{name}.answers.jsonl", self.answers.items)


def measure(
    subject: Subject,
    examples: Sequence[Example],
    config: EvaluateConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measurement:
    """Measure loss and exact matches; the same rows and settings give the same items.

    Args:
        subject: Model and tokenizer; the model is left as it was found.
        examples: Tokenised held-out rows; none at all measures nothing.
        config: What to measure.
        seed: Of the bootstrap.
        progress: Told of items done, first for the loss, then for the answers.

    Raises:
        EvaluateError: HB603 if exact matches are asked for by name and no row can be graded; HB604 for a loss
            that is not finite.
    """
    loss = answers = None
    if config.loss and examples:
        loss = held_out_loss(
            subject.model,
            examples,
            batch_size=config.batch_size,
            pad_id=subject.pad_id,
            resamples=config.bootstrap,
            seed=seed,
            progress=progress,
        )
    to_answer = rows_to_answer(examples, config)
    if to_answer or config.exact_match is True:
        answers = exact_match(
            subject.model,
            subject.tokenizer,
            to_answer,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            stop_ids=subject.stop_ids,
            progress=progress,
        )
    return Measurement(loss, answers)


def rows_to_answer(examples: Sequence[Example], config: EvaluateConfig) -> list[Example]:
    """The rows that answers are generated for: `max_items` of them by content hash, whatever their order.

    Where exact matches are `auto`, only rows that can be graded; where they are asked for, all.
    """
    if config.exact_match is False:
        return []
    chosen = [e for e in examples if config.exact_match is True or gradable(e)]
    if config.max_items is None or len(chosen) <= config.max_items:
        return chosen
    kept = set(sorted({e.id for e in chosen})[: config.max_items])
    return [e for e in chosen if e.id in kept]
