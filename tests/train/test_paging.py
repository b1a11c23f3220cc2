"""What can go wrong with the optimizer's pages, done for real: full disks, at the start and later, and kills."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.settings import TrainConfig
from halfbyte.train import adamw
from halfbyte.train.checkpoint import last_good
from halfbyte.train.display import Silent
from halfbyte.train.loop import TrainRun, rehearse, train
from halfbyte.train.metrics import StepRecord
from halfbyte.train.paging import PageFile

Build = Callable[[], PreTrainedModel]
CONFIG = TrainConfig(
    optimizer="paged_adamw_8bit", packing=False, batch_size=2, epochs=2, learning_rate=1e-2, save_steps=2
)


@pytest.fixture(autouse=True)
def _page_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "LEAST", 64)


@contextmanager
def _files_up_to(nbytes: int) -> Iterator[None]:
    """The system refuses to let files of this process grow beyond, or be written there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _run(model: PreTrainedModel, folder: Path) -> TrainRun:
    def save(target: Path) -> None:
        save_file(
            {n: p.detach().clone() for n, p in model.named_parameters()}, target / "weights.safetensors"
        )

    return TrainRun(folder, save, seed=3, resume=last_good(folder).checkpoint)


def _bits(model: PreTrainedModel) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def test_a_disk_without_room_is_told_before_anything_is_written(small_disk: Path) -> None:
    with pytest.raises(TrainError, match=r"HB514 .*takes 0\.002 GB on disk, 0\.001 GB are free") as refused:
        PageFile(small_disk / "run", 2_000_000)
    assert refused.value.where == str(small_disk)
    assert list(small_disk.iterdir()) == []
    PageFile(small_disk, 900_000)


@pytest.mark.parametrize("begin", [train, rehearse])
def test_a_run_that_has_no_room_ends_before_its_first_step(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, begin: Callable[..., object]
) -> None:
    model = tiny_llama()
    before = _bits(model)
    with _files_up_to(8192), pytest.raises(TrainError, match="HB514"):
        begin(model, Listed(rows), CONFIG, _run(model, tmp_path / "run"))
    assert _bits(model) == before
    assert not (tmp_path / "run").exists()


class _Fills(Silent):
    """The disk is full when a step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, record: StepRecord) -> None:
        if record.step == self._step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def test_a_disk_that_fails_later_stops_the_run_and_the_last_checkpoint_is_good(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    whole, model = tiny_llama(), tiny_llama()
    train(whole, Listed(rows), CONFIG, _run(whole, tmp_path / "whole"))
    run = replace(_run(model, tmp_path / "cut"), display=_Fills(3))
    with _files_up_to(resource.RLIM_INFINITY), pytest.raises(TrainError, match="HB515") as failed:
        train(model, Listed(rows), CONFIG, run)
    good = tmp_path / "cut/checkpoints/step-000002"
    assert f"the last good checkpoint is {good}" in failed.value.fix
    assert failed.value.where.startswith("step 4 of 8, ")
    model = tiny_llama()
    run = _run(model, tmp_path / "cut")
    assert run.resume is not None
    assert run.resume.folder == good
    train(model, Listed(rows), CONFIG, run)
    assert _bits(model) == _bits(whole)


def test_a_disk_that_fails_at_once_leaves_no_checkpoint_and_says_so(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(5, os.strerror(5))

    model = tiny_llama()
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(TrainError, match=r"HB515 .*cannot be read: Input/output error") as failed:
        train(model, Listed(rows), CONFIG, _run(model, tmp_path / "run"))
    assert "there is no checkpoint yet" in failed.value.fix


WRITES_OF_A_STEP = 16  # parameters of at least 64 numbers

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, test_paging
from halfbyte.data.examples import Listed
from halfbyte.train import adamw
from halfbyte.train.loop import train
from halfbyte.train.paging import PageFile

adamw.LEAST = 64
left = [int(sys.argv[3])]
write = PageFile.write

def counted(self, offset, data):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, offset, data)

PageFile.write = counted
model = conftest.tiny_llama.__wrapped__()()
train(model, Listed(conftest.rows.__wrapped__()), test_paging.CONFIG, test_paging._run(model, Path(sys.argv[2])))
"""


@pytest.mark.parametrize("writes", [5, 25, 61])
def test_a_run_killed_while_paging_goes_on_to_the_same_bits_and_leaves_no_pages(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, writes: int
) -> None:
    whole = tiny_llama()
    train(whole, Listed(rows), CONFIG, _run(whole, tmp_path / "whole"))
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "cut"), str(writes)]
    as_here = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # torch's own sums depend on it
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=as_here)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "cut"}
    assert {p.name for p in (tmp_path / "cut").iterdir()} <= {"metrics.jsonl", "checkpoints"}
    model = tiny_llama()
    run = _run(model, tmp_path / "cut")
    train(model, Listed(rows), CONFIG, run)
    assert _bits(model) == _bits(whole)
    assert (run.resume is not None) == (writes > 2 * WRITES_OF_A_STEP)


def test_the_arrays_of_a_parameter_in_one_piece_are_one_read_and_one_write(tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls: list[tuple[str, int, int]] = []

    class Counted(PageFile):
        def read(self, offset: int, into: memoryview) -> None:
            calls.append(("read", offset, into.nbytes))
            super().read(offset, into)

        def write(self, offset: int, data: memoryview) -> None:
            calls.append(("write", offset, data.nbytes))
            super().write(offset, data)

    parameter = torch.nn.Parameter(torch.randn(1000))
    parameter.grad = torch.ones(1000)
    adamw.SmallAdamW([parameter], bits=8, pages=lambda size: Counted(tmp_path, size)).step()
    size = 2 * 1024 + 64 + 16  # codes, scales and scales, each beginning on a line
    assert calls == [("read", 0, size), ("write", 0, size)]


def test_pages_are_zero_at_first_and_what_was_written_after(tmp_path: Path) -> None:
    pages = PageFile(tmp_path, 10_000)
    read = bytearray(100)
    pages.read(4096, memoryview(read))
    assert bytes(read) == bytes(100)
    pages.write(4096, memoryview(bytes(range(100))))
    pages.read(4096, memoryview(read))
    assert bytes(read) == bytes(range(100))
    assert pages.view(4096, 100, torch.uint8).tolist() == list(range(100))
    pages.release()
    assert pages.view(4096, 2, torch.float32).view(torch.uint8).tolist() == list(range(8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_ends_early_is_no_endless_loop(tmp_path: Path) -> None:
    pages = PageFile(tmp_path, 100)
    with pytest.raises(TrainError, match="HB515 .*the file ends early"):
        pages.read(64, memoryview(bytearray(100)))
