"""Supervised fine-tuning of a model with an encoder and a decoder: it reads prompts and writes answers.

It owns how rows of prompts and answers meet such a model; it must not know how a step is done.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from halfbyte.data.seq2seq import Pairs, PromptWriter, Seq2SeqExample, collate_seq2seq, encode_pairs
from halfbyte.data.tokenise import Example
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import ModelError
from halfbyte.evaluate.measure import Measurement, Subject, measure
from halfbyte.evaluate.perplexity import held_out_loss
from halfbyte.model.seq2seq import decoder_start, refuse_other_end
from halfbyte.tasks.sides import read_sides
from halfbyte.tasks.task import Prepared, Progress
from halfbyte.tasks.words import WordsTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.settings import Config


class Seq2SeqTask(WordsTask):
    """To write the answers of rows from their prompts; rows are padded, never packed.

    Args:
        config: Settings of the run.
        rows: Its rows.
        writer: Writes rows out, and holds the tokenizer.
        pairs: Counts of the rows to train on, and held out.

    Raises:
        ModelError: HB357 for a setting that such a model cannot follow.
    """

    def __init__(
        self, config: Config, rows: Prepared[Example], writer: PromptWriter, pairs: tuple[Pairs, Pairs]
    ) -> None:
        if config.train.neftune_alpha is not None:
            what = "noise on embeddings that an encoder and a decoder both read is not defined"
            fix = "set train.neftune_alpha to null"
            raise ModelError("HB357", what, where="train.neftune_alpha", fix=fix)
        self.was_packing = config.train.packing
        super().__init__(config.model_copy(update={"train": config.train.padded}), rows, writer.tokenizer)
        self.eos, self.pairs = writer.eos, pairs
        self.collate = partial(collate_seq2seq, pad_id=self.pad_id)

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, share out and tokenise the rows.

        Raises:
            DataError: HB201 to HB230 and HB245 to HB247, each naming every faulty row.
            ModelError: HB355 for a model whose decoder has no start, HB357 for a setting it cannot follow.
        """
        data = config.data
        writer = PromptWriter(load_tokenizer(config.model), data.template)
        sides = read_sides(config, held_out_only)
        start = decoder_start(Path(config.model))
        train, held_out = (
            encode_pairs(side, writer, start, data.max_length, data.max_truncated)
            for side in (sides.train, sides.held_out)
        )
        rows = Prepared[Example](
            train.listed,
            held_out.listed,
            sides.report,
            sides.reading,
            writer.template,
            writer.fingerprint,
            (train.cut, held_out.cut),
        )
        return cls(config, rows, writer, (train, held_out))

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given, and a model that ends answers otherwise.

        Raises:
            DataError: HB212 or HB213, naming every such row.
            ModelError: HB356 for another end.
        """
        super().check_fit(model)
        refuse_other_end(model, self.eos)

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Held-out loss, perplexity and exact matches."""
        subject = Subject(model, self.tokenizer, (self.eos,), self.pad_id, collate_seq2seq)
        config = self.config
        return measure(subject, list(self.rows.held_out), config.evaluate, config.seed, progress)

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """Nats per trained token."""
        found = held_out_loss(
            model,
            list(self.rows.held_out),
            batch_size=self.config.evaluate.batch_size,
            pad_id=self.pad_id,
            lay=collate_seq2seq,
            resamples=100,  # of the intervals nothing is kept
        )
        return found.loss.value

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        read = sum(len(cast("Seq2SeqExample", e).source) for e in self.rows.train)
        return super().facts() | {"prompt_tokens": read}

    def notes(self) -> list[str]:
        """How rows are laid, and what would make a good figure mislead."""
        found = []
        if self.was_packing:
            found.append(
                "Rows are padded, train.batch_size in a batch, not packed: the model has an encoder and a decoder."
            )
        unread, altered = (sum(getattr(p, name) for p in self.pairs) for name in ("unread", "altered"))
        if unread:
            found.append(f"In {unread:,} prompts the tokenizer has no token for a character: it is not read.")
        if altered:
            found.append(
                f"{altered:,} answers do not come back from the tokenizer as they are, such as line ends that become "
                "blanks: the model learns the changed ones, and no answer of it can match these rows exactly."
            )
        return found
