"""Tasks of a language model that learns words: shared ground, and supervised fine-tuning.

It owns how rows of words meet a language model; it must not know how a step is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.pack import collate
from halfbyte.data.render import Renderer
from halfbyte.data.tokenise import Example
from halfbyte.data.tokenizer import load_tokenizer, padding_id
from halfbyte.evaluate.answers import gradable
from halfbyte.evaluate.measure import Measurement, Subject, measure
from halfbyte.evaluate.perplexity import held_out_loss
from halfbyte.model.files import open_model_folder
from halfbyte.model.heads import trained_token_losses
from halfbyte.model.inputs import model_inputs
from halfbyte.model.limits import Limits
from halfbyte.model.precision import computing_dtype
from halfbyte.model.skeleton import build_skeleton
from halfbyte.tasks.sides import StoredSides, store_sides
from halfbyte.tasks.task import Prepared, Progress, Task
from halfbyte.train.methods import load_base, saver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from halfbyte.settings import Config


class WordsTask(Task[Example]):
    """A language model and rows of words.

    Args:
        config: Settings of the run.
        rows: Its rows.
        tokenizer: The model's.
    """

    def __init__(self, config: Config, rows: Prepared[Example], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config, rows)
        self.tokenizer = tokenizer
        self.pad_id = padding_id(self.tokenizer)

    def skeleton(self) -> PreTrainedModel:
        """The language model with weights that take no memory."""
        return build_skeleton(open_model_folder(self.config.model), computing_dtype(self.config.dtype))

    def load(self, progress: Progress | None = None) -> PreTrainedModel:
        """The language model, as its method holds it."""
        return load_base(self.config, progress)

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given.

        Raises:
            DataError: HB212 or HB213, naming every such row.
        """
        Limits.of(model).check([*self.rows.train, *self.rows.held_out])

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter, or model and tokenizer, with the fingerprint of the words it learnt."""
        assert self.rows.fingerprint is not None, "rows of words are written out in a template"
        saver(model, self.tokenizer, self.config, self.rows.fingerprint)(folder)

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        return super().facts() | {"trained_tokens": sum(e.trained_tokens for e in self.rows.train)}


class SftTask(WordsTask):
    """Supervised fine-tuning: to write the answers of the rows.

    Args:
        config: Settings of the run.
        rows: Its rows.
        renderer: Writes rows out, and holds the tokenizer.
        sides: The same rows, where they are stored.
    """

    is_timed = True

    def __init__(
        self, config: Config, rows: Prepared[Example], renderer: Renderer, sides: StoredSides
    ) -> None:
        super().__init__(config, rows, renderer.tokenizer)
        self.sides = sides
        self.stop_ids = sides.stop_ids

    @classmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, render and tokenise the rows, or find them tokenised, and share them out.

        Raises:
            DataError: HB201 to HB227, each naming every faulty row.
        """
        renderer = Renderer(load_tokenizer(config.model), config.data.template)
        sides = store_sides(config, renderer, held_out_only, progress)
        cut = [int((side.numbers("whole") > side.lengths).sum()) for side in (sides.train, sides.held_out)]
        misaligned = sum(int((side.numbers("aligned") == 0).sum()) for side in (sides.train, sides.held_out))
        rows = Prepared[Example](
            sides.train,
            sides.held_out,
            sides.report,
            sides.reading,
            renderer.template,
            Fingerprint.of(renderer),
            (cut[0], cut[1]),
            misaligned,
        )
        return cls(config, rows, renderer, sides)

    def notes(self) -> list[str]:
        """What a person should know of kept rows, and what would make a good figure mislead."""
        return self.sides.notes + super().notes()

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        return Task.facts(self) | {"trained_tokens": int(self.sides.train.numbers("trained").sum())}

    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given; row by row only if one of them may not fit.

        Raises:
            DataError: HB212 or HB213, naming every such row.
        """
        sides = (self.sides.train, self.sides.held_out)
        longest = max(int(side.lengths.max(initial=0)) for side in sides)
        lowest = min(side.file.id_range[0] for side in sides)
        highest = max(side.file.id_range[1] for side in sides)
        if not Limits.of(model).hold(lowest, highest, longest):
            super().check_fit(model)

    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Held-out loss, perplexity and exact matches."""
        subject = Subject(model, self.tokenizer, self.stop_ids, self.pad_id)
        config = self.config
        return measure(subject, list(self.rows.held_out), config.evaluate, config.seed, progress)

    def measured_pass(self, model: PreTrainedModel) -> None:
        """The longest rows at once, and the longest prompts with room for their answers."""
        rows, evaluate = list(self.longest_held_out().rows.held_out), self.config.evaluate
        batch = collate(rows, self.pad_id)
        if evaluate.loss:
            labels = torch.from_numpy(batch.labels)
            trained_token_losses(model, model_inputs(batch, model.device), labels)
        prompts = [len(row.prompt_ids) for row in rows if row.prompt_ids is not None and gradable(row)]
        if evaluate.exact_match is False or not prompts:
            return
        lengths, cache = (max(prompts), evaluate.max_new_tokens), None
        for length in lengths:
            ids = torch.zeros(len(prompts), length, dtype=torch.int64)
            told = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = told.past_key_values

    def held_out_loss(self, model: PreTrainedModel) -> float:
        """Nats per trained token."""
        found = held_out_loss(
            model,
            list(self.rows.held_out),
            batch_size=self.config.evaluate.batch_size,
            pad_id=self.pad_id,
            resamples=100,  # of the intervals nothing is kept
        )
        return found.loss.value
