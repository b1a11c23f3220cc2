"""The tasks there are, by name.

It owns that list; it must not know what any of them does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ModelError
from halfbyte.model.seq2seq import holds_encoder_decoder
from halfbyte.settings import PREFERENCES
from halfbyte.tasks.classify import ClassifyTask
from halfbyte.tasks.embed import EmbedTask
from halfbyte.tasks.images import ImagesTask
from halfbyte.tasks.preference import PreferenceTask
from halfbyte.tasks.seq2seq import Seq2SeqTask
from halfbyte.tasks.tag import TagTask
from halfbyte.tasks.task import Progress, Task
from halfbyte.tasks.words import SftTask, WordsTask

if TYPE_CHECKING:
    from halfbyte.settings import Config

TASKS: dict[str, type[Task[Any]]] = {
    "sft": SftTask,
    "classify": ClassifyTask,
    "tag": TagTask,
    "embed": EmbedTask,
    "classify_images": ImagesTask,
    **dict.fromkeys(PREFERENCES, PreferenceTask),
}


def prepare(config: Config, *, held_out_only: bool = False, progress: Progress | None = None) -> Task[Any]:
    """Make the rows of a run ready for the task its settings name; the model itself is not needed.

    Args:
        config: Settings of the run.
        held_out_only: Measure all rows of `data.eval`, or else of `data.train`, and train on none.
        progress: Told how far each part of the work is.

    Raises:
        DataError: Naming every faulty row.
        ModelError: HB354 for a task that a model with an encoder and a decoder is not tuned for.
    """
    return _task(config).prepare(config, held_out_only=held_out_only, progress=progress)


def _task(config: Config) -> type[Task[Any]]:
    """The task that is named, as a model of this kind is tuned for it."""
    task = TASKS[config.task]
    if not issubclass(task, WordsTask) or not holds_encoder_decoder(Path(config.model)):
        return task
    if task is SftTask:
        return Seq2SeqTask
    raise ModelError(
        "HB354",
        f"it has an encoder and a decoder, and task {config.task} is for causal language models",
        where=config.model,
        fix="set task to sft, or use a causal language model",
    )
