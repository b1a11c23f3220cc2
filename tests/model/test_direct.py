"""Promises of reading and writing past the system's cache: the same bytes, whatever the system offers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import ModelError
from halfbyte.model import direct, stored
from halfbyte.model.direct import PAGE, Ring, aligned_bytes, is_cached, read_direct
from halfbyte.model.quantised_file import bytes_of
from halfbyte.model.stored import StoredTensor, read_header

LENGTH = 3 * PAGE + 77


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes"
    path.write_bytes(np.random.default_rng(0).bytes(LENGTH))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path


def forget(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, direct.HUGE_PAGE - 1, direct.HUGE_PAGE, 5_000_000])
def test_memory_is_whole_pages_of_its_own(nbytes: int) -> None:
    memory = aligned_bytes(nbytes)
    assert len(memory) >= max(nbytes, 1)
    assert len(memory) % PAGE == memory.data_ptr() % PAGE == 0
    if nbytes >= direct.HUGE_PAGE and sys.platform == "linux":
        assert memory.data_ptr() % direct.HUGE_PAGE == 0
    memory.fill_(7)
    assert bool((memory == 7).all())


@pytest.mark.skipif(not direct._DIRECT, reason="the system offers no O_DIRECT")
@pytest.mark.parametrize("begin", [0, PAGE, 3 * PAGE, 4 * PAGE])
def test_a_file_is_read_up_to_its_end(file: Path, begin: int) -> None:
    memory = bytes_of(aligned_bytes(4 * PAGE))
    expected = file.read_bytes()[begin:]
    assert read_direct(file, begin, memory) == len(expected)
    assert memory[: len(expected)] == expected


def test_nothing_is_read_where_a_system_does_not_offer_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = bytes_of(aligned_bytes(PAGE))
    assert read_direct(file.with_name("none"), 0, memory) == 0
    if direct._DIRECT:
        assert read_direct(file, 1, memory) in (0, PAGE), (
            "a place that is no page's: refused, unless any is taken"
        )
    monkeypatch.setattr(direct, "_DIRECT", 0)
    assert read_direct(file, 0, memory) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says so")
def test_it_is_known_what_the_cache_holds(file: Path) -> None:
    file.read_bytes()
    if not is_cached(file, 0, LENGTH):
        pytest.skip("this system does not say so")
    forget(file)
    assert not is_cached(file, 0, LENGTH)


def store(folder: Path, names: int = 3) -> dict[str, StoredTensor]:
    tensors = {str(n): torch.randn(1000 + n, 33).bfloat16() for n in range(names)}
    save_file(tensors, folder / "model.safetensors")
    with (folder / "model.safetensors").open("rb") as stream:
        os.fsync(stream.fileno())
    return read_header(folder / "model.safetensors")


@pytest.mark.parametrize("how", ["cold", "warm", "refused", "not offered", "odd place"])
def test_a_tensor_that_passes_through_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for whole in store(tmp_path).values():
        tensor = whole
        if how == "odd place":
            tensor = StoredTensor("odd", whole.file, whole.dtype, (999,), whole.start + 1, 999 * 2)
        expected = tensor.read()
        if how != "warm" and hasattr(os, "posix_fadvise"):
            forget(tensor.file)
        if how == "refused":
            monkeypatch.setattr(stored, "read_direct", lambda *_: 0)
        if how == "not offered":
            monkeypatch.setattr(direct, "_DIRECT", 0)
        got = tensor.pass_through(aligned_bytes(tensor.room))
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))
        if how == "cold" and direct._DIRECT:
            assert not is_cached(tensor.file, tensor.start, tensor.nbytes)


@pytest.mark.skipif(not direct._DIRECT, reason="the system offers no O_DIRECT")
def test_what_is_in_no_cache_is_read_past_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = next(iter(store(tmp_path).values()))
    forget(tensor.file)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("it was read in the ordinary way"))
    monkeypatch.setattr(stored, "is_cached", lambda *_: False)
    tensor.pass_through(aligned_bytes(tensor.room))


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    *_, last = store(tmp_path).values()
    os.truncate(last.file, last.start + last.nbytes - 1)
    with pytest.raises(ModelError, match="HB307"):
        last.pass_through(aligned_bytes(last.room))


def test_stretches_that_are_held_never_overlap() -> None:
    ring, random = Ring(10 * PAGE), np.random.default_rng(0)
    held, given = [], 0
    for number in range(500):
        taken = ring.take(int(random.integers(0, 5 * PAGE)))
        if taken is not None:
            stretch, memory = taken
            assert memory.data_ptr() % PAGE == 0
            memory.fill_(number % 251)
            held.append((stretch, memory, number % 251))
            given += 1
        if taken is None or random.random() < 0.4:
            stretch, memory, mark = held.pop(int(random.integers(len(held))))
            assert bool((memory == mark).all())
            ring.give_back(stretch)
    assert given > 100
    while held:
        ring.give_back(held.pop()[0])
    assert ring.take(10 * PAGE) is not None
