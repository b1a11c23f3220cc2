"""Exporters: the steps of a run told to TensorBoard, MLflow or Weights & Biases as they happen.

It owns how each of them is told; it must not know how a step is done. What they are told is also in metrics.jsonl:
one that fails is left out from then on, and a note says so, but the run goes on.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import EvaluateError

if TYPE_CHECKING:
    from halfbyte.settings import Config
    from halfbyte.train.display import Display
    from halfbyte.train.metrics import StepRecord

IDS = "trackers.json"
"""File of a run's folder that says under which ids it is known elsewhere, so that a resumed run goes on there."""


class Tracker(ABC):
    """One exporter.

    Args:
        config: Settings of the run, told as its parameters.
        folder: The run's folder.
        id: Id under which the run is known there already; None begins.
    """

    package: str
    """What is to be installed for it."""

    def __init__(self, config: Config, folder: Path, id: str | None) -> None:  # noqa: A002
        self.parameters, self.folder, self.id = flat(config.model_dump()), folder, id

    @abstractmethod
    def start(self) -> None:
        """Begin, or go on; sets `id` where the exporter gives one."""

    @abstractmethod
    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell one step."""

    @abstractmethod
    def stop(self) -> None:
        """End."""


class TensorBoard(Tracker):
    """Event files in the run's folder, for `tensorboard --logdir`."""

    package = "tensorboard"

    def start(self) -> None:
        """Open an event file; those of an earlier part of the run lie beside it."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        text = "\n".join(f"    {name}: {value}" for name, value in self.parameters.items())
        self.writer.add_text("settings", text)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add the scalars."""
        for name, number in numbers.items():
            self.writer.add_scalar(f"train/{name}", number, step)

    def stop(self) -> None:
        """Close the file."""
        self.writer.close()


class MLflow(Tracker):
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    package = "mlflow-skinny"

    def start(self) -> None:
        """Begin a run named as the folder, with the settings as parameters."""
        import mlflow

        self.client = mlflow.MlflowClient()
        if self.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
            known = self.client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self.client.create_experiment(name)
            self.id = str(self.client.create_run(experiment, run_name=self.folder.name).info.run_id)
            for name, value in self.parameters.items():
                self.client.log_param(self.id, name, value)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the metrics."""
        for name, number in numbers.items():
            self.client.log_metric(str(self.id), name, number, step=step)

    def stop(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(str(self.id))


class WandB(Tracker):
    """A run of Weights & Biases, as WANDB_PROJECT, WANDB_MODE and its other variables have it."""

    package = "wandb"

    def start(self) -> None:
        """Begin a run named as the folder, or go on with it."""
        import wandb

        self.run = wandb.init(
            id=self.id, resume="allow", name=self.folder.name, dir=self.folder, config=self.parameters
        )
        self.id = self.run.id

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log the metrics."""
        self.run.log(dict(numbers), step=step)

    def stop(self) -> None:
        """End the run."""
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
"""Exporters by their names in `train.report_to`."""


class Tracked:
    """A display whose steps are told to exporters too.

    Args:
        display: What shows the run.
        trackers: The exporters by name.
        folder: The run's folder, which keeps the ids they give.
        note: Told of an exporter that fails.
    """

    def __init__(
        self, display: Display, trackers: Mapping[str, Tracker], folder: Path, note: Callable[[str], None]
    ) -> None:
        self._display, self._trackers, self._folder, self._note = display, dict(trackers), folder, note

    def start(self, total_steps: int) -> None:
        """Begin everywhere."""
        self._each(lambda tracker: tracker.start())
        ids = {name: tracker.id for name, tracker in self._trackers.items() if tracker.id is not None}
        (self._folder / IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")
        self._display.start(total_steps)

    def step(self, record: StepRecord) -> None:
        """Tell and show the step."""
        numbers = {
            name: float(value)
            for name, value in asdict(record).items()
            if isinstance(value, int | float) and name != "step"
        }
        self._each(lambda tracker: tracker.step(record.step, numbers))
        self._display.step(record)

    def stop(self) -> None:
        """End everywhere."""
        self._each(lambda tracker: tracker.stop())
        self._display.stop()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # any of theirs: a server that is away must not end hours of work
                del self._trackers[name]
                self._note(f"{name} is told nothing from here on: {type(error).__name__}: {error}")


def tracked(display: Display, config: Config, folder: Path, note: Callable[[str], None]) -> Display:
    """The display, with the exporters that `train.report_to` names.

    Args:
        display: What shows the run.
        config: Settings of the run.
        folder: The run's folder.
        note: Told of an exporter that fails.
    """
    names = config.train.report_to
    if not names:
        return display
    file = folder / IDS
    ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    trackers: dict[str, Tracker] = {name: TRACKERS[name](config, folder, ids.get(name)) for name in names}
    return Tracked(display, trackers, folder, note)


def check_installed(names: Sequence[str]) -> None:
    """Refuse exporters whose package is missing, before any work.

    Raises:
        EvaluateError: HB606.
    """
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            package = TRACKERS[name].package
            raise EvaluateError(
                "HB606",
                f"got no {name}, which train.report_to names",
                where="train.report_to",
                fix=f"pip install {package}, or leave it out",
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
