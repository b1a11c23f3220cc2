"""Tasks of an encoder: what they share, whatever stands on it.

It owns how encoded rows meet an encoder, packed or padded; it must not know which head it is or what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from halfbyte.data.encoder_texts import EncodedBatch, EncodedExample, collate_encoded
from halfbyte.data.examples import Listed
from halfbyte.data.fingerprint import NO_FORMAT, Fingerprint
from halfbyte.data.tokenizer import padding_id
from halfbyte.errors import ModelError
from halfbyte.evaluate.perplexity import distinct_examples
from halfbyte.model.adapters import load_adapter
from halfbyte.model.encoders import unpackable
from halfbyte.model.files import open_model_folder
from halfbyte.model.heads import Objective
from halfbyte.model.limits import Limits
from halfbyte.model.mode import measured
from halfbyte.model.precision import computing_dtype
from halfbyte.model.purpose import LABELS, Head, Purpose, stored_labels
from halfbyte.model.skeleton import build_skeleton
from halfbyte.tasks.task import Prepared, Progress, Task
from halfbyte.train.methods import load_base, saver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.settings import Config
    from halfbyte.tasks.sides import Sides

R = TypeVar("R")


class EncoderTask(Task[EncodedExample]):
    """An encoder and rows of texts.

    Rows are packed where the settings say so and the encoder's family can keep them apart; else they are padded, and
    `notes` says why.

    Args:
        config: Settings of the run.
        rows: Its rows.
        tokenizer: The model's.
        labels: Names of the classes, in the order of their numbers; none without classes.

    Attributes:
        purpose: What the model is loaded for.

    Raises:
        ModelError: HB350 for a model that is no encoder.
    """

    purpose: ClassVar[Purpose]

    def __init__(
        self,
        config: Config,
        rows: Prepared[EncodedExample],
        tokenizer: PreTrainedTokenizerBase,
        labels: tuple[str, ...] = (),
    ) -> None:
        super().__init__(config, rows)
        self.tokenizer, self.labels = tokenizer, labels
        self.pad_id = padding_id(tokenizer)
        self.why_padded = unpackable(self.skeleton()) if config.train.packing else ""
        if self.why_padded:
            self.config = config.model_copy(update={"train": config.train.padded})
        packs = self.config.train.packing
        self.collate = partial(collate_encoded, pad_id=None if packs else self.pad_id)

    @property
    def objective(self) -> Objective:
        """What is minimised of each class that is to be learnt."""
        return Objective(self.config.train.label_smoothing, self.config.train.z_loss)

    def head(self, seed: int | None) -> Head:
        """What stands on the encoder; with a seed it may begin anew."""
        return Head(self.purpose, self.labels, seed)

    @property
    def trained_head(self) -> Head:
        """What stands on the encoder, which may begin anew."""
        return self.head(self.config.seed)

    def skeleton(self) -> PreTrainedModel:
        """The encoder and its head with weights that take no memory."""
        folder, dtype = open_model_folder(self.config.model), computing_dtype(self.config.dtype)
        return build_skeleton(folder, dtype, self.head(None))

    def load(self, progress: Progress | None = None) -> PreTrainedModel:
        """The encoder as its method holds it, with the folder's head for these labels, or a new one."""
        return load_base(self.config, progress, self.head(self.config.seed))

    def load_trained(self, adapter: Path | None, progress: Progress | None = None) -> PreTrainedModel:
        """The encoder with the head that was trained, for the labels it was trained with.

        Raises:
            DataError: HB232 naming every row whose label was never trained on.
            ModelError: HB351 where neither adapter nor folder holds a trained head, HB352 where the adapter does not
                say for which labels it was trained.
        """
        known = stored_labels(adapter or Path(self.config.model)) if self.labels else ()
        if known:
            self.take_labels(known)
        elif self.labels and adapter is not None:
            fix = f"put its labels there as {LABELS}, in the order of their numbers"
            raise ModelError("HB352", f"there is no {LABELS}", where=str(adapter), fix=fix)
        base = load_base(self.config, progress, self.head(self.config.seed if adapter else None))
        self.check_fit(base)
        if adapter is not None:
            load_adapter(base, adapter)
        return base

    def take_labels(self, labels: tuple[str, ...]) -> None:
        """Go over to the labels of a trained head, where it names any."""

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given.

        Raises:
            DataError: HB212 or HB213, naming every such row.
        """
        Limits.of(model).check([*self.rows.train, *self.rows.held_out])

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter with its head, or model and tokenizer, with the fingerprint of the tokenizer."""
        assert self.rows.fingerprint is not None, "rows of texts are tokenised"
        saver(model, self.tokenizer, self.config, self.rows.fingerprint)(folder)

    def notes(self) -> list[str]:
        """Why rows are padded, where they were to be packed."""
        if not self.why_padded:
            return []
        return [f"Rows are padded, train.batch_size in a batch, not packed: {self.why_padded}."]

    def answers(
        self,
        model: PreTrainedModel,
        answer: Callable[[PreTrainedModel, EncodedBatch], R],
        progress: Progress | None = None,
    ) -> Iterator[tuple[list[EncodedExample], R]]:
        """What a model makes of the distinct held-out rows, batch by batch, the longest first.

        Args:
            model: Left as it was found.
            answer: Takes model and batch.
            progress: Told of rows done.

        Raises:
            EvaluateError: HB603 for no rows.
        """
        rows = sorted(distinct_examples(list(self.rows.held_out)), key=lambda e: e.tokens, reverse=True)
        size = self.config.evaluate.batch_size
        with measured(model):
            for begin in range(0, len(rows), size):
                part = rows[begin : begin + size]
                yield part, answer(model, collate_encoded(part, self.pad_id))
                if progress is not None:
                    progress(begin + len(part), len(rows))


def prepared_texts(
    train: Listed[EncodedExample],
    held_out: Listed[EncodedExample],
    sides: Sides,
    tokenizer: PreTrainedTokenizerBase,
    members: int = 1,
) -> Prepared[EncodedExample]:
    """Encoded rows with what was counted in them.

    Args:
        train: To train on.
        held_out: To measure on.
        sides: The rows as they were read.
        tokenizer: Encoded them.
        members: Texts of each row, next to each other.
    """

    def cut(examples: Listed[EncodedExample]) -> int:
        rows = (examples[at : at + members] for at in range(0, len(examples), members))
        return sum(any(text.truncated for text in row) for row in rows)

    return Prepared(
        train,
        held_out,
        sides.report,
        sides.reading,
        NO_FORMAT,
        Fingerprint.of_texts(tokenizer),
        (cut(train), cut(held_out)),
    )
