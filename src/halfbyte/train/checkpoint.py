"""The checkpoint of a training run: its weights and where it stood, in a folder that is whole or absent.

It owns trainer_state.json; it must not know what a model saves beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.data.order import Position
from halfbyte.model.saving import whole_folder, write_json

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    """Where a run stood when its checkpoint was written; for people, a run cannot yet be continued from it.

    Args:
        step: Optimizer steps done.
        total_steps: Optimizer steps planned.
        epoch: Passes over the data finished, fractional.
        loss: Loss of the last step, None before the first.
        tokens: Tokens seen, without padding.
        seed: Seed of the run.
        position: Which pass over which rows comes next.
        reason: Why it was written.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    tokens: int
    seed: int
    position: Position
    reason: str


def write_checkpoint(folder: Path, save: Callable[[Path], None], state: TrainerState) -> Path:
    """Write a checkpoint folder: what `save` puts there, and the state with each file's SHA-256.

    Args:
        folder: Folder to create.
        save: Writes the weights into the folder it is given.
        state: Where the run stands.

    Returns:
        The folder.

    Raises:
        ModelError: HB316 if the folder cannot be written.
    """
    with whole_folder(folder) as work:
        save(work)
        digests = {file.name: _sha256(file) for file in sorted(work.iterdir())}
        write_json(work / STATE_FILE, {**asdict(state), "files_sha256": digests})
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
