"""The checkpoint of a training run: what was trained so far, and all that going on from there takes.

It owns the folder's files, their digests and which checkpoint of a run is good; it must not know what a model saves
beside them, nor how a run goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.data.order import Position
from halfbyte.errors import TrainError
from halfbyte.model.saving import remove_remains, whole_folder, write_json

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "training_state.safetensors"
_NAME = "step-{:06d}"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stood when its checkpoint was written, after a whole step.

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps planned.
        first_loss: Loss of the first step; None before it.
        loss: Loss of the last step; None before the first.
        epoch: Passes over the data finished, fractional.
        tokens: Tokens seen, without padding.
        trained_tokens: Tokens that carried loss.
        documents: Rows seen.
        passes: Forward and backward passes done.
        room: Tokens those had room for.
        seconds: Wall time of training.
        seed: Seed of the run.
        rows_sha256: Digest of the rows trained on, in order.
        position: Which pass over which rows comes next.
        best_step: Step after which the held-out loss was lowest so far; None where it was not measured.
        best_loss: That loss.
        not_better: Measurements since.
        reason: Why it was written.
    """

    step: int
    total_steps: int
    first_loss: float | None
    loss: float | None
    epoch: float
    tokens: int
    trained_tokens: int
    documents: int
    passes: int
    room: int
    seconds: float
    seed: int
    rows_sha256: str
    position: Position
    best_step: int | None
    best_loss: float | None
    not_better: int
    reason: str

    @classmethod
    def beginning(cls, total_steps: int, seed: int, rows_sha256: str) -> TrainerState:
        """Before the first step."""
        return cls(
            step=0,
            total_steps=total_steps,
            first_loss=None,
            loss=None,
            epoch=0.0,
            tokens=0,
            trained_tokens=0,
            documents=0,
            passes=0,
            room=0,
            seconds=0.0,
            seed=seed,
            rows_sha256=rows_sha256,
            position=Position(),
            best_step=None,
            best_loss=None,
            not_better=0,
            reason="",
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Args:
        folder: Where it lies.
        state: Where the run stood.
        tensors: By name: trained parameters, the optimizer's state, random generators.
    """

    folder: Path
    state: TrainerState
    tensors: Mapping[str, Tensor]

    def refuse_other_run(self, beginning: TrainerState) -> None:
        """Refuse to go on with a run that begins otherwise than the one that left this.

        Raises:
            TrainError: HB511.
        """

        def run(state: TrainerState) -> tuple[object, ...]:
            return state.total_steps, state.seed, state.rows_sha256

        if run(self.state) != run(beginning):
            raise TrainError(
                "HB511",
                "it is of a run with other rows, another seed or another number of steps",
                where=str(self.folder),
                fix="resume with the rows and settings that the run began with",
            )


class Found(NamedTuple):
    """The checkpoint to go on from, and why newer ones were passed over.

    Attributes:
        checkpoint: The newest that is whole; None without any.
        refused: A sentence for each newer one that is not.
    """

    checkpoint: Checkpoint | None
    refused: list[str]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run's checkpoint after a step lies."""
    return run / "checkpoints" / _NAME.format(step)


def write_checkpoint(
    folder: Path, save: Callable[[Path], None], state: TrainerState, tensors: Mapping[str, Tensor]
) -> Path:
    """Write a checkpoint folder, on disk as a whole before it has its name.

    Args:
        folder: Folder to create.
        save: Writes what was trained, as others load it, into the folder it is given.
        state: Where the run stands.
        tensors: What else going on takes.

    Returns:
        The folder.

    Raises:
        ModelError: HB316 if the folder cannot be written.
    """
    with whole_folder(folder) as work:
        save(work)
        save_file(dict(tensors), work / TENSORS_FILE)
        found = asdict(state) | {"files_sha256": {f.name: _sha256(f) for f in sorted(work.iterdir())}}
        write_json(work / STATE_FILE, found | {"sha256": _of_json(found)})
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, every byte of it held against its digest.

    Raises:
        TrainError: HB510 naming the file that is missing, damaged or of another version.
    """
    found = _state(folder / STATE_FILE)
    for name, digest in found.pop("files_sha256").items():
        file = folder / Path(name).name
        if not file.is_file():
            raise _damaged(file, "is missing")
        if _sha256(file) != digest:
            raise _damaged(file, "is not what was written: its SHA-256 differs")
    try:
        tensors = load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise _damaged(folder / TENSORS_FILE, str(error)) from error
    return Checkpoint(folder, TrainerState(**{**found, "position": Position(**found["position"])}), tensors)


def last_good(run: Path) -> Found:
    """The newest whole checkpoint of a run; what a killed run left half-written is removed.

    Args:
        run: The run's folder.
    """
    refused: list[str] = []
    remove_remains(run)
    remove_remains(run / "checkpoints")
    for folder in reversed(_checkpoints(run)):
        try:
            return Found(read_checkpoint(folder), refused)
        except TrainError as error:
            refused.append(f"{error.where} {error.what}")
    return Found(None, refused)


def prune(run: Path, limit: int, best_step: int | None) -> None:
    """Remove all but the newest checkpoints of a run and its best.

    Args:
        run: The run's folder.
        limit: How many stay, ≥ 1.
        best_step: Whose checkpoint stays besides; None for none.
    """
    for folder in _checkpoints(run)[:-limit]:
        if best_step is None or folder != checkpoint_folder(run, best_step):
            shutil.rmtree(folder)


def _checkpoints(run: Path) -> list[Path]:
    """In the order of their steps."""
    found = (run / "checkpoints").glob(_NAME.format(0)[:5] + "*")
    return sorted((f for f in found if f.is_dir()), key=lambda f: int(f.name.removeprefix("step-")))


def _state(file: Path) -> dict[str, Any]:
    """The fields of a state file, its own digest checked."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        digest = found.pop("sha256")
        whole = digest == _of_json(found)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(file, f"cannot be read: {error}") from error
    if not whole:
        raise _damaged(file, "is not what was written: its SHA-256 differs")
    wanted = {field.name for field in fields(TrainerState)} | {"files_sha256"}
    if set(found) != wanted:
        raise _damaged(file, "was written by another version of halfbyte")
    return dict(found)


def _damaged(file: Path, what: str) -> TrainError:
    return TrainError("HB510", what, where=str(file), fix="go on from an earlier checkpoint, or begin anew")


def _of_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
