"""Classification: to tell the class of a text, or of a pair of texts.

It owns how labelled rows become numbers, a loss and metrics; it must not know how a step is done.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch

from halfbyte.data.encoder_texts import EncodedExample, Text, encode
from halfbyte.data.examples import Listed
from halfbyte.data.labels import LabelReport, label_names, name_of, refuse_unknown, train_labels
from halfbyte.data.row import Row
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.evaluate.classes import Answered, measured_classes
from halfbyte.evaluate.measure import Measurement
from halfbyte.model.encoders import document_logits
from halfbyte.tasks.encoder import EncoderTask, prepared_texts
from halfbyte.tasks.sides import read_sides
from halfbyte.tasks.task import Prepared, Progress
from halfbyte.train.labelled import LabelLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.settings import Config


class ClassifyTask(EncoderTask):
    """An encoder with a class for each label.

    Args:
        config: Settings of the run.
        rows: Its rows.
        tokenizer: The model's.
        labelled: The rows as they were read, to train on and held out.
        labels: Names of the classes, in the order of their numbers.
    """

    purpose = "classify"

    def __init__(
        self,
        config: Config,
        rows: Prepared[EncodedExample],
        tokenizer: PreTrainedTokenizerBase,
        labelled: tuple[Sequence[Row], Sequence[Row]],
        labels: tuple[str, ...],
    ) -> None:
        super().__init__(config, rows, tokenizer, labels)
        self._labelled = labelled
        self.balance = LabelReport.of(labels, *labelled)

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, share out and tokenise the rows, and number their labels.

        Raises:
            DataError: HB201 to HB232, each naming every faulty row.
        """
        tokenizer = load_tokenizer(config.model)
        sides = read_sides(config, held_out_only)
        if held_out_only:
            labels = label_names(map(name_of, sides.held_out))
        else:
            labels = train_labels(sides.train)
            refuse_unknown(sides.held_out, labels)
        train, held_out = (
            Listed(encode(list(map(_text, side)), tokenizer, config.data.max_length))
            for side in (sides.train, sides.held_out)
        )
        rows = prepared_texts(train, held_out, sides, tokenizer)
        return cls(config, rows, tokenizer, (sides.train, sides.held_out), labels)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Label of each row, by the row's id."""
        return {row.id: name_of(row) for side in self._labelled for row in side}

    def titles(self, example: EncodedExample) -> tuple[str, ...]:
        """Its label."""
        return (f"label {self._names[example.id]}",)

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each row's class, by the row's id."""
        number = {label: at for at, label in enumerate(self.labels)}
        return {row: number[name] for row, name in self._names.items()}

    def take_labels(self, labels: tuple[str, ...]) -> None:
        """Go over to the labels of a trained head."""
        refuse_unknown(self._labelled[1], labels)
        self.labels = labels

    @cached_property
    def loss(self) -> LabelLoss:
        """Cross-entropy of the classes."""
        return LabelLoss(self.numbers, self.objective)

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Accuracy, macro-F1, Matthews' correlation and loss; nothing without held-out rows."""
        if not len(self.rows.held_out):
            return Measurement(())
        config = self.config
        return measured_classes(
            self._answered(model, progress),
            self.labels,
            resamples=config.evaluate.bootstrap,
            seed=config.seed,
        )

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """Nats per row."""
        return self._answered(model).loss

    def _answered(self, model: PreTrainedModel, progress: Progress | None = None) -> Answered:
        parts = (
            (part, torch.log_softmax(logits.double(), dim=1).cpu().numpy())
            for part, logits in self.answers(model, document_logits, progress)
        )
        return Answered.of(parts, self.numbers)

    def described(self) -> str:
        """The counts in a few words, the balance of the labels among them."""
        return f"{super().described()}; {self.balance.described()}"

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        return super().facts() | {"labels": ", ".join(self.labels), "balance": self.balance.described()}


def _text(row: Row) -> Text:
    return Text(row.text or "", row.text_pair, row.id, row.where)
