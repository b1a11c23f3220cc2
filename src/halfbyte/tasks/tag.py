"""Tagging: to tell the class of each word of a text.

It owns how rows of words with tags become numbers, a loss and metrics; it must not know how a step is done.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from halfbyte.data.encoder_texts import EncodedExample, encode_words
from halfbyte.data.examples import Listed
from halfbyte.data.labels import label_names
from halfbyte.data.pack import UNTRAINED
from halfbyte.data.row import Row
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import DataError, listed
from halfbyte.evaluate.measure import Measurement
from halfbyte.evaluate.tagged import Tagged, measured_tags
from halfbyte.model.encoders import token_logits
from halfbyte.tasks.encoder import EncoderTask, prepared_texts
from halfbyte.tasks.sides import read_sides
from halfbyte.tasks.task import Progress
from halfbyte.train.labelled import TagLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from halfbyte.settings import Config


class TagTask(EncoderTask):
    """An encoder with a class for each tag."""

    purpose = "tag"

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, share out and tokenise the rows, and number their tags.

        Raises:
            DataError: HB201 to HB232, each naming every faulty row.
        """
        tokenizer = load_tokenizer(config.model)
        sides = read_sides(config, held_out_only)
        labels = _names(sides.held_out if held_out_only else sides.train)
        if not held_out_only:
            if len(labels) < 2:
                what = f"the rows to train on have {len(labels)} tag(s), expected at least two"
                raise DataError("HB231", what, fix="give rows with words of every class")
            refuse_unknown_tags(sides.held_out, labels)
        train, held_out = (
            Listed(encode_words(side, labels, tokenizer, config.data.max_length))
            for side in (sides.train, sides.held_out)
        )
        rows = prepared_texts(train, held_out, sides, tokenizer)
        task = cls(config, rows, tokenizer, labels)
        task._held_out = sides.held_out
        return task

    _held_out: Sequence[Row] = ()

    def take_labels(self, labels: tuple[str, ...]) -> None:
        """Go over to the tags of a trained head, and number the rows' anew."""
        refuse_unknown_tags(self._held_out, labels)
        self.labels = labels
        encoded = encode_words(self._held_out, labels, self.tokenizer, self.config.data.max_length)
        self.rows = replace(self.rows, held_out=Listed(encoded))

    def titles(self, example: EncodedExample) -> tuple[str, ...]:
        """Each token that has a tag, with it."""
        assert example.targets is not None, "rows of words have tags"
        tokens = self.tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
        tagged = zip(tokens, example.targets.tolist(), strict=True)
        return ("tags " + ", ".join(f"{t} {self.labels[n]}" for t, n in tagged if n != UNTRAINED),)

    @cached_property
    def loss(self) -> TagLoss:
        """Cross-entropy of the classes of words."""
        return TagLoss(self.objective)

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Accuracy, macro-F1 and loss of words; nothing without held-out rows."""
        if not len(self.rows.held_out):
            return Measurement(())
        config = self.config
        return measured_tags(
            self._tagged(model, progress), self.labels, resamples=config.evaluate.bootstrap, seed=config.seed
        )

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """Nats per word."""
        rows = self._tagged(model)
        own = [row.log_probabilities[np.arange(len(row.targets)), row.targets] for row in rows]
        return float(-np.concatenate(own).mean())

    def _tagged(self, model: PreTrainedModel, progress: Progress | None = None) -> list[Tagged]:
        found = []
        for part, logits in self.answers(model, token_logits, progress):
            known = torch.log_softmax(logits.double(), dim=2).cpu().numpy()
            for example, row in zip(part, known, strict=True):
                assert example.targets is not None, "rows of words have classes"
                at = np.flatnonzero(example.targets != UNTRAINED)
                found.append(Tagged(example.id, example.where, row[at], example.targets[at]))
        return found

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        return super().facts() | {
            "labels": ", ".join(self.labels),
            "trained_tokens": sum(int(e.trained.sum()) for e in self.rows.train),
        }


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return label_names(tag for row in rows for _, tag in row.tags)


def refuse_unknown_tags(rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Refuse rows with a tag that the model has no class for.

    Raises:
        DataError: HB232 naming every such row.
    """
    known = set(labels)
    odd = {row.where: sorted({tag for _, tag in row.tags} - known) for row in rows}
    faults = [f"{where}: {', '.join(map(repr, tags))}" for where, tags in odd.items() if tags]
    if faults:
        raise DataError(
            "HB232",
            f"{len(faults)} of {len(rows)} held-out rows have tags that were never trained on"
            + listed(faults),
            fix=f"the tags trained on are {' and '.join(map(repr, labels))}; correct these, add rows with them to "
            "data.train, or remove these rows",
        )
