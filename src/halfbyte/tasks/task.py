"""What the pipeline asks of a task, whatever a model is tuned for.

It owns that list of questions and the answers most tasks share; it must not know any one task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from halfbyte.data.containers import row_files
from halfbyte.data.examples import Learnable, Listed
from halfbyte.data.order import longest_first
from halfbyte.model.adapters import load_adapter
from halfbyte.train.plan import Plan, unit_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.check import DataReport
    from halfbyte.data.examples import ExampleSet
    from halfbyte.data.faults import Reading
    from halfbyte.data.fingerprint import Fingerprint
    from halfbyte.data.images.read import ImageReport
    from halfbyte.data.pack import Batch
    from halfbyte.evaluate.measure import Measurement
    from halfbyte.model.purpose import Head
    from halfbyte.model.residency import Residency
    from halfbyte.settings import Config
    from halfbyte.train.step import StepLoss

E = TypeVar("E", bound=Learnable)
Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Prepared(Generic[E]):
    """Rows, ready for the model.

    Attributes:
        train: To train on; those that are judged together stand next to each other.
        held_out: To measure on, none of them trained on; may be empty.
        report: What was counted in the files.
        reading: Formats of the files, and the faulty rows that were skipped.
        template: How the rows were written out.
        fingerprint: Digests of chat format and tokenizer, kept with what is trained; None where neither is used.
        cut: Rows to train on, and held out, that were cut at `max_length`.
        misaligned: Rows in which a token straddles the border of prompt and answer.
    """

    train: ExampleSet[E]
    held_out: ExampleSet[E]
    report: DataReport | ImageReport
    reading: Reading
    template: str
    fingerprint: Fingerprint | None = None
    cut: tuple[int, int] = (0, 0)
    misaligned: int = 0


class Task(ABC, Generic[E]):
    """Rows that are ready for a model, and what is made of both.

    Args:
        config: Settings of the run.
        rows: Its rows.

    Attributes:
        members: Examples that are judged together: each unit of the rows is so many, next to each other.
        collate: Makes the batch of some examples; None packs or pads tokens, as the settings have it.
        begins: What `begin` notes, in a word; empty where it notes nothing.
        pad_id: Token id to fill short rows with; it is masked, so any id will do.
        is_timed: Whether a step is one pass of a causal language model over its rows, which is timed.
    """

    members: int = 1
    collate: Callable[[Sequence[Any]], Batch] | None = None
    begins: str = ""
    pad_id: int = 0
    is_timed: bool = False

    def __init__(self, config: Config, rows: Prepared[E]) -> None:
        self.config, self.rows = config, rows

    @classmethod
    @abstractmethod
    def prepare(
        cls, config: Config, *, held_out_only: bool = False, progress: Progress | None = None
    ) -> Self:
        """Read, check, share out and encode the rows; the model itself is not needed.

        Args:
            config: Settings of the run.
            held_out_only: Measure all rows of `data.eval`, or else of `data.train`, and train on none.
            progress: Told how far each part of the work is.

        Raises:
            DataError: Naming every faulty row.
        """

    @abstractmethod
    def skeleton(self) -> PreTrainedModel:
        """The model that `load` gives, with weights that take no memory."""

    @abstractmethod
    def load(self, progress: Progress | None = None) -> PreTrainedModel:
        """The base with the head the task needs, as its method holds it."""

    def load_trained(self, adapter: Path | None, progress: Progress | None = None) -> PreTrainedModel:
        """A model that was trained, to be measured alone.

        Args:
            adapter: Folder of an adapter in PEFT's format to put on the base; None for a whole model.
            progress: Told how far reading is.
        """
        model = self.load(progress)
        self.check_fit(model)
        self.begin(model, progress)
        if adapter is not None:
            load_adapter(model, adapter)
        return model

    @abstractmethod
    def check_fit(self, model: PreTrainedModel) -> None:
        """Refuse rows that the model cannot be given; weights without memory will do."""

    def begin(self, model: PreTrainedModel, progress: Progress | None = None) -> None:
        """Note what is needed of the model as it is before the first step."""

    @property
    def loss(self) -> StepLoss | None:
        """What a step minimises; None is the loss of tokens, as the settings have it."""
        return None

    @property
    def loss_without_reference(self) -> StepLoss | None:
        """`loss` before `begin` noted anything, to see what it takes and not what it comes to."""
        return self.loss

    def measured_pass(self, model: PreTrainedModel) -> None:
        """Do the largest pass of measuring, to see what it takes; what comes out is dropped."""
        rows, loss = list(self.longest_held_out().rows.held_out), self.loss_without_reference
        if self.collate is not None and loss is not None:
            loss.share(model, self.collate(rows), 1)

    @property
    def trained_head(self) -> Head | None:
        """What stands on an encoder; None for a model that writes."""
        return None

    def residing(self, residency: Residency | None) -> Self:
        """The same with its base where a forecast has it; None where all of it trains."""
        task = copy(self)
        if residency is not None:
            task.config = self.config.model_copy(update={"residency": residency})
        return task

    @abstractmethod
    def measure(self, model: PreTrainedModel, progress: Progress | None = None) -> Measurement:
        """Measure a model on the held-out rows, as the settings ask for it."""

    @abstractmethod
    def held_out_loss(self, model: PreTrainedModel) -> float:
        """The number by which one state of a training is told to be better than another; lower is better."""

    @abstractmethod
    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write what was trained into a folder: an adapter, or a whole model."""

    def plan(self) -> Plan:
        """The steps that training has.

        Raises:
            ConfigError: HB102 where `batch_tokens` does not hold the longest row.
        """
        return Plan.of(unit_lengths(self.rows.train, self.members), self.config.train, self.config.seed)

    def longest_held_out(self) -> Self:
        """The same with the longest held-out rows alone, as many as are measured at once."""
        held_out, each = self.rows.held_out, self.members
        units = longest_first(held_out.lengths.reshape(-1, each).sum(1))[: self.config.evaluate.batch_size]
        chosen = [held_out[each * unit + k] for unit in units for k in range(each)]
        task = copy(self)
        task.rows = replace(self.rows, held_out=Listed(chosen))
        return task

    def count(self, examples: ExampleSet[E]) -> int:
        """Rows behind some examples."""
        return len(examples) // self.members

    def described(self) -> str:
        """The counts in a few words."""
        rows = self.rows
        facts = [
            f"{self.count(side):,} {name}" + f" ({cut:,} cut at max_length)" * bool(cut)
            for side, cut, name in zip(
                (rows.train, rows.held_out), rows.cut, ("to train on", "held out"), strict=True
            )
        ]
        if rows.reading.skipped:
            facts.append(f"{len(rows.reading.skipped):,} bad rows skipped")
        if rows.report.duplicates:
            facts.append(f"{rows.report.duplicates:,} duplicates")
        return ", ".join([*facts, self.form()])

    def form(self) -> str:
        """How the rows are given to the model, in a few words."""
        return f"template {self.rows.template}"

    def titles(self, example: E) -> tuple[str, ...]:
        """What each member of a unit is, in a word or two for a person; empty texts where there is nothing to say.

        Args:
            example: The first of the members.
        """
        return ("",) * self.members

    def files(self) -> list[Path]:
        """The files that the rows were read from, for the run's manifest."""
        data = self.config.data
        return row_files([*data.train, *(data.eval or ())])

    def facts(self) -> dict[str, int | str]:
        """What a rehearsal prints."""
        rows = self.rows
        return {
            "template": rows.template,
            "train_rows": self.count(rows.train),
            "train_tokens": int(rows.train.lengths.sum()),
            "held_out_rows": self.count(rows.held_out),
            "truncated_rows": sum(rows.cut),
            "misaligned_rows": rows.misaligned,
            "duplicate_rows": rows.report.duplicates,
            "skipped_rows": len(rows.reading.skipped),
        }

    def notes(self) -> list[str]:
        """What would make a good figure mislead."""
        if not self.rows.misaligned:
            return []
        return [
            f"In {self.rows.misaligned:,} rows a token straddles the border of prompt and answer: the model never "
            "learns how such an answer begins, and answers from other tokens than it was trained on. "
            "Mostly a blank at the end of the prompt is to blame; move it to the answer's beginning."
        ]
