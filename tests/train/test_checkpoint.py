"""Promises of checkpoint folders: whole or absent, every byte held against a digest, the newest good one found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.data.order import Position
from halfbyte.errors import TrainError
from halfbyte.train.checkpoint import (
    STATE_FILE,
    TENSORS_FILE,
    TrainerState,
    checkpoint_folder,
    last_good,
    prune,
    read_checkpoint,
    write_checkpoint,
)

STATE = replace(
    TrainerState.beginning(total_steps=9, seed=4, rows_sha256="0" * 64),
    step=3,
    epoch=0.5,
    first_loss=2.5,
    loss=1.25,
    tokens=77,
    position=Position(1, 2, 3),
    reason="save_steps",
)
TENSORS = {"parameter/w": torch.tensor([1.0, -0.0, 3e-39]), "random/cpu": torch.arange(5, dtype=torch.uint8)}


def _save(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(b"abc")


def _written(run: Path, step: int) -> Path:
    return write_checkpoint(checkpoint_folder(run, step), _save, replace(STATE, step=step), TENSORS)


def test_a_checkpoint_holds_weights_state_and_digests(tmp_path: Path) -> None:
    folder = _written(tmp_path, 3)
    assert (folder / "weights.bin").read_bytes() == b"abc"
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    # SHA-256 of "abc", FIPS 180-2 appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert state["files_sha256"]["weights.bin"] == digest
    assert state["position"] == {"epoch": 1, "window": 2, "index": 3}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    found = read_checkpoint(_written(tmp_path, 3))
    assert found.state == STATE
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found.tensors[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_folder_does_not_exist_under_its_name_before_it_is_whole(tmp_path: Path) -> None:
    seen: list[bool] = []
    folder = tmp_path / "step-3"
    write_checkpoint(folder, lambda _: seen.append(folder.exists()), STATE, TENSORS)
    assert seen == [False]
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        _save(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "step-3", fail, STATE, TENSORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["weights.bin", TENSORS_FILE, STATE_FILE])
def test_one_flipped_bit_anywhere_is_refused_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str
) -> None:
    _written(tmp_path, 3)
    file = _written(tmp_path, 6) / name
    whole = file.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 40))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(TrainError, match="HB510") as caught:
            read_checkpoint(file.parent)
        assert str(file) in str(caught.value)
    found = last_good(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.state.step == 3
    (why,) = found.refused
    assert why.startswith(str(file))


@pytest.mark.parametrize("name", ["weights.bin", TENSORS_FILE, STATE_FILE])
def test_a_missing_or_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    file = _written(tmp_path, 3) / name
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(TrainError, match="HB510"):
        read_checkpoint(file.parent)
    file.unlink()
    with pytest.raises(TrainError, match="HB510"):
        read_checkpoint(file.parent)
    assert last_good(tmp_path).checkpoint is None


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    _written(tmp_path, 3)
    half = tmp_path / "checkpoints" / ".step-000006.0123abcd.new"
    half.mkdir()
    (half / "weights.bin").write_bytes(b"a")
    assert last_good(tmp_path).checkpoint is not None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_folder_that_was_just_being_replaced_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".adapter.0123abcd.old").mkdir()
    (tmp_path / ".adapter.0123abcd.old" / "weights.bin").write_bytes(b"abc")
    (tmp_path / ".adapter.0123abcd.new").mkdir()
    last_good(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter" / "weights.bin").read_bytes() == b"abc"


def test_the_newest_checkpoints_are_kept_by_step_and_not_by_name(tmp_path: Path) -> None:
    for step in (999_999, 2, 1_000_001):
        _written(tmp_path, step)
    prune(tmp_path, 2, best_step=None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-1000001", "step-999999"]
    found = last_good(tmp_path).checkpoint
    assert found is not None
    assert found.state.step == 1_000_001
