"""Promises of reading safetensors: every damage is named, and what is read is what was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import ModelError
from halfbyte.model.stored import HEADER_LIMIT_BYTES, read_header

EVERY_KIND = {
    "matrix": torch.arange(15, dtype=torch.float32).reshape(3, 5),
    "half": torch.randn(7).to(torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "none": torch.empty(0, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "mask": torch.tensor([True, False, True]),
    "precise": torch.tensor([1e-300], dtype=torch.float64),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(EVERY_KIND, path, metadata={"format": "pt"})
    return path


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path: Path, code: str = "HB307") -> str:
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert caught.value.code == code
    assert caught.value.where == str(path)
    assert caught.value.fix
    return caught.value.what


def test_every_type_and_shape_is_read_back_bit_for_bit(file: Path) -> None:
    stored = read_header(file)
    assert stored.keys() == EVERY_KIND.keys()
    for name, expected in EVERY_KIND.items():
        got = stored[name].read()
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(got, expected)


def test_a_buffer_is_read_into_and_nothing_past_the_tensor_is_written(file: Path) -> None:
    stored = read_header(file)["matrix"]
    buffer = torch.full((stored.nbytes + 3,), 7, dtype=torch.uint8)
    got = stored.read(buffer)
    assert torch.equal(got, EVERY_KIND["matrix"])
    assert got.data_ptr() == buffer.data_ptr()
    assert buffer[-3:].tolist() == [7, 7, 7]


def test_tensors_are_listed_in_the_order_of_their_bytes(file: Path) -> None:
    starts = [tensor.start for tensor in read_header(file).values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_a_file_cut_off_in_its_header_is_refused(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    assert "header" in refused(file)


def test_a_file_cut_off_in_its_data_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    assert "describes" in refused(file)


def test_a_file_with_bytes_to_spare_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
    assert "describes" in refused(file)


def test_a_file_cut_off_after_it_was_checked_is_refused_when_read(file: Path) -> None:
    stored = list(read_header(file).values())[-1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError) as caught:
        stored.read()
    assert caught.value.code == "HB307"
    assert stored.name in caught.value.what


def test_a_header_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    with open(path, "wb") as stream:
        stream.write((HEADER_LIMIT_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(HEADER_LIMIT_BYTES + 100)  # sparse: no such bytes on disk
    assert f"{HEADER_LIMIT_BYTES:,}" in refused(path)


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (b"\xff\xfe", "JSON"),
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        ([1], "list"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', "twice"),
        ({"a": 1}, "object"),
        ({"a": entry([1], 0, 4, "F99") | {"dtype": 3}}, "dtype"),
        ({"a": entry([-1], 0, 4)}, "shape"),
        ({"a": entry([1.0], 0, 4)}, "shape"),
        ({"a": entry([True], 0, 4)}, "shape"),
        ({"a": entry([1], 4, 0)}, "-4 bytes"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, "data_offsets"),
        ({"a": entry([2], 0, 4)}, "needs 8"),
        ({"a": entry([2**62], 0, 4)}, "needs"),
        ({"a": entry([1], 4, 8)}, "begins at byte"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, "begins at byte"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: object, named: str) -> None:
    assert named in refused(write(tmp_path / "bad.safetensors", header, b"\0" * 4))


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "fp8.safetensors", {"w": entry([4], 0, 4, "F8_E4M3")}, b"\0" * 4)
    assert "F8_E4M3" in refused(path, "HB310")


def test_the_reference_reader_agrees_on_a_good_file(file: Path) -> None:
    from safetensors import safe_open

    read: Callable[..., Any] = safe_open
    with read(file, framework="pt") as reference:
        assert set(reference.keys()) == set(read_header(file))
        for name, stored in read_header(file).items():
            assert torch.equal(reference.get_tensor(name), stored.read())
