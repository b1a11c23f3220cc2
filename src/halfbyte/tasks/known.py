"""The tasks there are, by name.

It owns that list; it must not know what any of them does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from halfbyte.settings import PREFERENCES
from halfbyte.tasks.classify import ClassifyTask
from halfbyte.tasks.embed import EmbedTask
from halfbyte.tasks.images import ImagesTask
from halfbyte.tasks.preference import PreferenceTask
from halfbyte.tasks.tag import TagTask
from halfbyte.tasks.task import Progress, Task
from halfbyte.tasks.words import SftTask

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
    """
    return TASKS[config.task].prepare(config, held_out_only=held_out_only, progress=progress)
