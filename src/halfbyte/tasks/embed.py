"""Embedding: vectors of texts that are near each other where the texts are alike.

It owns how rows of texts become pairs, a loss and metrics; it must not know how a step is done.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from halfbyte.data.encoder_texts import EncodedExample, Text, collate_encoded, encode
from halfbyte.data.examples import Listed
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import DataError, listed
from halfbyte.evaluate.measure import Measurement
from halfbyte.evaluate.retrieval import Pairs, measured_partners, measured_scores
from halfbyte.model.mode import measured
from halfbyte.model.pooling import document_vectors, pooling_of
from halfbyte.tasks.encoder import EncoderTask, prepared_texts
from halfbyte.tasks.sides import read_sides
from halfbyte.tasks.task import Progress
from halfbyte.train.alike import CosineLoss, PartnerLoss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from halfbyte.data.row import Row
    from halfbyte.settings import Config
    from halfbyte.train.step import StepLoss


class EmbedTask(EncoderTask):
    """An encoder whose pooled states are the vectors of texts."""

    purpose = "embed"
    _sides: tuple[Sequence[Row], Sequence[Row]] = ((), ())

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, share out and tokenise the rows: the texts of each next to each other.

        Raises:
            DataError: HB201 to HB234, each naming every faulty row.
        """
        tokenizer = load_tokenizer(config.model)
        sides = read_sides(config, held_out_only)
        members = _members([*sides.train, *sides.held_out])
        train, held_out = (
            Listed(encode([text for row in side for text in _texts(row)], tokenizer, config.data.max_length))
            for side in (sides.train, sides.held_out)
        )
        rows = prepared_texts(train, held_out, sides, tokenizer, members)
        task = cls(config, rows, tokenizer)
        task.members, task._sides = members, (sides.train, sides.held_out)
        return task

    def titles(self, example: EncodedExample) -> tuple[str, ...]:
        """Which of a row's texts each is, and how alike they are to be."""
        scores = {one: score for (one, _), score in self.scored.items()}
        if example.id in scores:
            return "text", f"its partner, score {scores[example.id]:g}"
        return ("text", "its partner", "a text that is not alike")[: self.members]

    @cached_property
    def vectors(self) -> partial[torch.Tensor]:
        """What makes vectors of documents, pooled as the model's folder says."""
        return partial(document_vectors, pooling=pooling_of(Path(self.config.model)))

    @cached_property
    def scored(self) -> dict[tuple[str, str], float]:
        """Score of each pair, by the ids of its texts; empty where texts simply are alike."""
        rows = [row for side in self._sides for row in side if row.score is not None]
        return {(one.id, two.id): row.score or 0.0 for row in rows for one, two in [_texts(row)]}

    @cached_property
    def loss(self) -> StepLoss:
        """In-batch negatives, or the squared difference from scores."""
        return (
            CosineLoss(self.vectors, self.scored) if self.scored else PartnerLoss(self.vectors, self.members)
        )

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Recall@1 and mean reciprocal rank, or Spearman's correlation; nothing without held-out rows."""
        known = {example.id for example in self.rows.held_out}
        distinct = {row.id: row for row in self._sides[1]}.values()
        rows = [row for row in distinct if all(text.id in known for text in _texts(row))]
        if not rows:
            return Measurement(())
        vectors = self._vectors(model, progress)
        names = [[text.id for text in _texts(row)] for row in rows]
        pairs = Pairs(
            [row.id for row in rows],
            [row.where for row in rows],
            np.stack([vectors[each[0]] for each in names]),
            np.stack([vectors[each[1]] for each in names]),
            [each[1] for each in names],
        )
        how = {"resamples": self.config.evaluate.bootstrap, "seed": self.config.seed}
        if self.scored:
            return measured_scores(pairs, [row.score or 0.0 for row in rows], **how)
        return measured_partners(pairs, **how)

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """The loss of a step per row, over passes of `evaluate.batch_size` rows."""
        examples, size = self.rows.held_out, self.config.evaluate.batch_size * self.members
        total = 0.0
        with measured(model):
            for begin in range(0, len(examples), size):
                part = [examples[at] for at in range(begin, min(begin + size, len(examples)))]
                batch = collate_encoded(part, self.pad_id)
                total += self.loss.share(model, batch, 1).loss
        return total / self.count(examples)

    def _vectors(self, model: PreTrainedModel, progress: Progress | None) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for part, vectors in self.answers(model, self.vectors, progress):
            found.update(zip([e.id for e in part], vectors.double().cpu().numpy(), strict=True))
        return found


def _texts(row: Row) -> list[Text]:
    """The texts of a row, each with its own content hash: equal texts are known for the same."""
    texts = [text for text in (row.text, row.text_pair, row.negative) if text is not None]
    return [Text(text, None, hashlib.sha256(text.encode()).hexdigest()[:16], row.where) for text in texts]


def _members(rows: Sequence[Row]) -> int:
    """Texts of each row.

    Raises:
        DataError: HB234 for rows of several kinds, or scores that no cosine reaches.
    """
    wrong = [f"{row.where}: {row.score:g}" for row in rows if row.score is not None and abs(row.score) > 1]
    if wrong:
        what = f"{len(wrong)} of {len(rows)} rows have a score outside of -1 to 1, which no cosine reaches"
        raise DataError("HB234", what + listed(wrong), fix="bring all scores to -1 to 1, or 0 to 1")
    kinds = {(len(_texts(row)), row.score is None) for row in rows}
    if len(kinds) > 1:
        count = [sum((len(_texts(row)), row.score is None) == kind for row in rows) for kind in sorted(kinds)]
        what = f"rows of {len(kinds)} kinds: {', '.join(map(str, count))} with other texts or scores than the rest"
        raise DataError(
            "HB234", what, fix="give rows of one kind: pairs, pairs with a negative, or pairs with a score"
        )
    return next(iter(kinds))[0] if kinds else 2
