"""Promises of checkpoint folders: whole or absent, with the state and digests inside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.data.order import Position
from halfbyte.train.checkpoint import STATE_FILE, TrainerState, write_checkpoint

STATE = TrainerState(
    step=3,
    total_steps=9,
    epoch=0.5,
    loss=1.25,
    tokens=77,
    seed=4,
    position=Position(1, 2, 3),
    reason="save_steps",
)


def test_a_checkpoint_holds_weights_state_and_digests(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"abc")

    folder = write_checkpoint(tmp_path / "checkpoints" / "step-3", save, STATE)
    assert (folder / "weights.bin").read_bytes() == b"abc"
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    # SHA-256 of "abc", FIPS 180-2 appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert state == {
        "step": 3,
        "total_steps": 9,
        "epoch": 0.5,
        "loss": 1.25,
        "tokens": 77,
        "seed": 4,
        "position": {"epoch": 1, "window": 2, "index": 3},
        "reason": "save_steps",
        "files_sha256": {"weights.bin": digest},
    }


def test_the_folder_does_not_exist_under_its_name_before_it_is_whole(tmp_path: Path) -> None:
    seen: list[bool] = []
    write_checkpoint(tmp_path / "step-3", lambda folder: seen.append((tmp_path / "step-3").exists()), STATE)
    assert seen == [False]
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"abc")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "step-3", fail, STATE)
    assert list(tmp_path.iterdir()) == []
