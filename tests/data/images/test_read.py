"""Promises of labelled images: every fault has a name before training, and equal pictures are known."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from halfbyte.data.faults import Reading
from halfbyte.data.images.idx import read_idx
from halfbyte.data.images.read import (
    ImageReport,
    read_images,
    refuse_two_labels,
)
from halfbyte.errors import DataError


def picture(seed: int, height: int = 12, width: int = 10) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(file: Path, pixels: NDArray[np.uint8], **how: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file, **how)
    return file


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes, three images."""
    save(tmp_path / "set" / "cat" / "1.png", picture(1))
    save(tmp_path / "set" / "cat" / "deep" / "2.jpg", picture(2))
    save(tmp_path / "set" / "dog" / "3.JPEG", picture(3))
    (tmp_path / "set" / "dog" / ".DS_Store").write_bytes(b"hidden")
    return tmp_path / "set"


def idx(shape: tuple[int, ...], content: bytes, magic: bytes | None = None) -> bytes:
    return (magic or bytes([0, 0, 8, len(shape)])) + struct.pack(f">{len(shape)}I", *shape) + content


def write_idx(folder: Path, images: NDArray[np.uint8], labels: list[int], name: str = "t10k") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-images-idx3-ubyte"
    file.write_bytes(idx(images.shape, images.tobytes()))
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx((len(labels),), bytes(labels)))
    return file


def png_of_size(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


# Folders


def test_a_folder_for_each_class(classes: Path) -> None:
    told: list[tuple[int, int]] = []
    rows = read_images(classes, progress=lambda *done: told.append(done))
    assert [(Path(row.where).name, row.label) for row in rows] == [
        ("1.png", "cat"),
        ("2.jpg", "cat"),
        ("3.JPEG", "dog"),
    ]
    np.testing.assert_array_equal(rows[0].pixels(), picture(1))
    assert told[-1] == (3, 3)
    assert ImageReport.of(rows) == ImageReport(3, 0, {"cat": 2, "dog": 1})


def test_a_row_is_known_by_its_pixels_and_label_wherever_it_stands(tmp_path: Path) -> None:
    save(tmp_path / "a" / "cat" / "1.png", picture(1))
    save(tmp_path / "a" / "cat" / "again.png", picture(1), compress_level=0)
    save(tmp_path / "a" / "cat" / "wide.png", picture(1).reshape(10, 12, 3))
    save(tmp_path / "a" / "dog" / "1.png", picture(1))
    one, again, wide, dog = read_images(tmp_path / "a")
    assert one.id == again.id
    assert len({one.id, wide.id, dog.id}) == 3
    assert one.content == dog.content != wide.content
    assert ImageReport.of([one, again, wide]).duplicates == 1


@pytest.mark.parametrize("keep", [10, 60, 0.5, 0.98])
@pytest.mark.parametrize("name", ["bad.png", "bad.jpg"])
def test_a_truncated_image_is_named(classes: Path, name: str, keep: float) -> None:
    whole = save(classes / "cat" / name, picture(4, 60, 60)).read_bytes()
    (classes / "cat" / name).write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(DataError, match=rf"HB235(?s:.*)1 of 4 images(?s:.*)cat/{name}: not "):
        read_images(classes)


def test_every_bad_image_is_named_at_once(classes: Path) -> None:
    (classes / "cat" / "notes.txt").write_text("cats")
    (classes / "cat" / "fake.png").write_text("cats")
    (classes / "cat" / "zero.jpg").write_bytes(b"")
    (classes / "dog" / "bomb.png").write_bytes(png_of_size(60_000, 60_000))
    (classes / "dog" / "large.png").write_bytes(png_of_size(9_000, 10_000))
    PIL.Image.fromarray(picture(1)).save(classes / "dog" / "moving.png", format="GIF")
    PIL.Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(classes / "dog" / "deep.png")
    frames = [PIL.Image.fromarray(picture(n)) for n in (5, 6)]
    frames[0].save(classes / "dog" / "film.png", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="HB235") as caught:
        read_images(classes)
    lines = str(caught.value).splitlines()
    for name, reason in {
        "notes.txt": "ends in '.txt'",
        "fake.png": "not an image in PNG or JPEG",
        "zero.jpg": "not an image in PNG or JPEG",
        "bomb.png": "more than 67,108,864 pixels",
        "large.png": "more than 67,108,864 pixels: 9,000 x 10,000",
        "moving.png": "not an image in PNG or JPEG",
        "deep.png": "mode I;16",
        "film.png": "animated",
    }.items():
        (line,) = [line for line in lines if name in line]
        assert reason in line


def test_bad_images_are_left_out_as_far_as_the_settings_allow(classes: Path) -> None:
    (classes / "cat" / "fake.png").write_text("cats")
    reading = Reading(allowed=1)
    assert len(read_images(classes, reading)) == 3
    (fault,) = reading.skipped
    assert json.loads(reading.as_json_lines())["line"] is None
    assert str(fault) == f"{classes / 'cat' / 'fake.png'}: not an image in PNG or JPEG"
    (classes / "cat" / "more.png").write_text("cats")
    with pytest.raises(DataError, match="HB235"):
        read_images(classes, Reading(allowed=1))


def test_places_that_hold_no_labelled_images_are_named_at_once(classes: Path, tmp_path: Path) -> None:
    (classes / "horse").mkdir()
    save(classes / "stray.png", picture(9))
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("a.png cat\n")
    places = [
        classes,
        tmp_path / "empty",
        tmp_path / "gone",
        tmp_path / "rows.txt",
        classes / "cat" / "1.png",
    ]
    with pytest.raises(DataError, match="HB236") as caught:
        read_images(places, Reading(allowed=99))
    text = str(caught.value)
    assert "set: the class horse holds no image" in text
    assert "set: stray.png lies in no class's folder" in text
    assert "empty: holds no folder for a class" in text
    assert "gone: does not exist" in text
    assert "rows.txt: expected a folder" in text
    assert "1.png: expected a folder" in text


def test_images_need_pillow_and_say_so(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"HB215(?s:.*)halfbyte\[images\]"):
        read_images(classes)


# IDX


def test_idx_files_are_read_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    file = write_idx(tmp_path / "plain", images, [7, 0, 7])
    rows = read_images(tmp_path / "plain")
    assert [(row.where, row.label) for row in rows] == [
        (f"{file}:{n}", label) for n, label in enumerate("707")
    ]
    np.testing.assert_array_equal(rows[2].pixels(), np.repeat(images[2][:, :, None], 3, axis=2))
    packed = tmp_path / "packed"
    packed.mkdir()
    for each in (tmp_path / "plain").iterdir():
        (packed / f"{each.name}.gz").write_bytes(gzip.compress(each.read_bytes()))
    assert [row.id for row in read_images(packed / f"{file.name}.gz")] == [row.id for row in rows]


def test_real_digits(shared: Callable[[str], Path]) -> None:
    rows = read_images(shared("datasets/mnist/t10k-images-idx3-ubyte.gz"))
    report = ImageReport.of(rows)
    assert (report.rows, report.duplicates) == (10_000, 0)
    assert report.labels == dict(
        zip("0123456789", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], strict=True)
    )
    assert rows[0].label == "7"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (idx((2, 4, 4), bytes(31)), "31 of 32 bytes"),
        (idx((2, 4, 4), bytes(33)), "more than 32 bytes"),
        (idx((2**32 - 1, 2**32 - 1, 2**32 - 1), bytes(32)), "32 of"),
        (idx((2, 4, 4), bytes(32), bytes([0, 0, 13, 3])), "begins with 00000d03"),
        (idx((2, 16), bytes(32)), "begins with 00000802"),
        (bytes([0, 0, 8, 3, 0]), "within its header"),
        (idx((0, 4, 4), b""), "0 images, t10k-labels-idx1-ubyte 2 labels"),
        (idx((2, 0, 4), b""), "at least one image"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_an_idx_header_that_lies_is_refused(
    content: bytes, reason: str, packed: bool, tmp_path: Path
) -> None:
    write_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), [0, 1])
    file = tmp_path / "t10k-images-idx3-ubyte"
    file.unlink()
    if packed:
        file, content = file.with_name(f"{file.name}.gz"), gzip.compress(content)
    file.write_bytes(content)
    reason = f"{reason}|not unpacked into memory" if packed else reason
    with pytest.raises(DataError, match=f"HB236(?s:.*)({reason})"):
        read_images(file)


def test_damaged_compression_and_foreign_labels_are_refused(tmp_path: Path) -> None:
    file = write_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), [0, 1, 2])
    with pytest.raises(DataError, match="HB236(?s:.*)2 images, t10k-labels-idx1-ubyte 3 labels"):
        read_images(file)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="HB236(?s:.*)expected t10k-labels-idx1-ubyte beside it"):
        read_images(file)
    packed = tmp_path / "a-images-idx3-ubyte.gz"
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx((2,), bytes(2)))
    for content in (b"no gzip", gzip.compress(idx((2, 4, 4), bytes(32)))[:-12]):
        packed.write_bytes(content)
        with pytest.raises(DataError, match="HB236(?s:.*)not readable"):
            read_images(packed)
    with pytest.raises(DataError, match="HB236(?s:.*)name the file that is meant"):
        read_images(tmp_path)


def test_a_plain_idx_file_stays_on_disk(tmp_path: Path) -> None:
    file = write_idx(tmp_path, np.zeros((2, 4, 4), np.uint8), [0, 1])
    assert isinstance(read_idx(file, 3), np.memmap)


# Files of rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_rows_name_image_files(classes: Path, suffix: str) -> None:
    table = {"image": ["cat/1.png", "dog/3.JPEG"], "label": ["cat", "dog"]}
    objects = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    file = classes / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(table), file)
    elif suffix.startswith(".json"):
        text = "\n".join(map(json.dumps, objects)) + "\n" if suffix == ".jsonl" else json.dumps(objects)
        file.write_text(text)
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [tuple(table), *(tuple(each.values()) for each in objects)]
        file.write_text("".join(comma.join(line) + "\n" for line in lines))
    rows = read_images(file)
    assert [row.label for row in rows] == ["cat", "dog"]
    assert [row.source for row in rows] == [str(file)] * 2
    np.testing.assert_array_equal(rows[0].pixels(), picture(1))


def test_bad_rows_are_named_with_their_line_and_file(classes: Path) -> None:
    rows = [
        '{"image": "cat/gone.png", "label": "cat"}',
        '{"image": "cat/1.png"}',
        '{"image": "cat/1.png", "label": true}',
        '{"image": "cat/1.png", "label": " "}',
        '{"picture": "cat/1.png", "label": 1}',
        '{"image": 3, "label": 1}',
        "[]",
        "{",
    ]
    file = classes / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="HB235") as caught:
        read_images(file)
    lines = [line for line in str(caught.value).splitlines() if "rows.jsonl:" in line]
    assert len(lines) == len(rows)
    assert "rows.jsonl:1: " in lines[0]
    assert "gone.png" in lines[0]
    (classes / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="HB236(?s:.*)empty.jsonl: the file holds no rows"):
        read_images(classes / "empty.jsonl")
    (classes / "broken.csv").write_text('image,label\n"cat/1.png,cat\n')
    with pytest.raises(DataError, match="HB236(?s:.*)broken.csv: line 2: "):
        read_images(classes / "broken.csv")


# Sets of rows


def test_one_picture_under_two_labels_is_refused(classes: Path) -> None:
    save(classes / "dog" / "copy.png", picture(1))
    rows = read_images(classes)
    with pytest.raises(
        DataError, match=r"HB238(?s:.*)2 of 4(?s:.*)cat/1.png: (?s:.*)'cat', 'dog'(?s:.*)dog/copy.png"
    ):
        refuse_two_labels(rows)
    reading = Reading(allowed=2)
    assert [row.where for row in refuse_two_labels(rows, reading)] == [rows[1].where, rows[2].where]
    assert len(reading.skipped) == 2


def test_an_image_that_changed_since_it_was_checked_stops_the_run(classes: Path) -> None:
    rows = read_images(classes)
    save(classes / "cat" / "1.png", picture(8))
    with pytest.raises(DataError, match="HB241(?s:.*)others(?s:.*)cat/1.png"):
        rows[0].pixels()
    (classes / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match="HB241"):
        rows[0].pixels()
    assert len(rows[1].pixels())
