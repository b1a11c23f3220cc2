"""Where labelled images lie: a folder for each class, IDX files, or files of rows that name image files.

It owns what each of these places looks like and how a label is told; it must not open an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from halfbyte.data.containers import CONTAINERS
from halfbyte.data.faults import BadFileError, BadRowError, Fault
from halfbyte.data.images.decode import SUFFIXES
from halfbyte.data.images.idx import IMAGES, labels_file, read_idx
from halfbyte.data.images.row import ArrayPicture, FilePicture, Pointer
from halfbyte.data.row import Json
from halfbyte.data.turns import class_of, text_of
from halfbyte.data.values import kind

PATH_COLUMNS = ("image", "file_name", "image_path")
LABEL_COLUMN = "label"
EXPECTED = (
    "a folder with one folder of images per class, an IDX file (...images-idx3-ubyte, also .gz), "
    f"or rows ({', '.join(suffix for suffix in CONTAINERS if suffix != '.txt')}) with an image's path and a label"
)

Found = Pointer | Fault


class BadPlaceError(Exception):
    """What is wrong with a place as a whole, a line for each fault; no row of it can be skipped."""


def labelled_images(place: Path) -> Iterator[Found]:
    """What a place says of each of its images, in a fixed order, or what is wrong with one of them.

    Raises:
        BadPlaceError: For a place that is none of the three kinds, or is damaged.
    """
    if not place.exists():
        raise BadPlaceError("does not exist")
    if IMAGES.fullmatch(place.name):
        yield from _of_idx(place)
    elif place.is_dir():
        yield from _of_folder(place)
    elif place.suffix in CONTAINERS and place.suffix != ".txt":
        yield from _of_rows(place)
    else:
        raise BadPlaceError(f"expected {EXPECTED}")


def _of_folder(folder: Path) -> Iterator[Found]:
    """Class folders, in the order of their names, images at any depth; or the one IDX file a folder holds."""
    inside = _visible(folder)
    idx = [file for file in inside if IMAGES.fullmatch(file.name)]
    if len(idx) == 1:
        yield from _of_idx(idx[0])
        return
    if idx:
        raise BadPlaceError(f"holds {', '.join(file.name for file in idx)}: name the file that is meant")
    classes = [path for path in inside if path.is_dir()]
    if not classes:
        raise BadPlaceError(f"holds no folder for a class; expected {EXPECTED}")
    files = {cls: [file for file in _visible(cls, "**/*") if not file.is_dir()] for cls in classes}
    faults = [f"{path.name} lies in no class's folder" for path in inside if not path.is_dir()]
    faults += [f"the class {cls.name} holds no image" for cls, found in files.items() if not found]
    if faults:
        raise BadPlaceError("\n".join(faults))
    for cls, found in files.items():
        for file in found:
            if file.suffix.lower() in SUFFIXES:
                yield Pointer(str(file), None, FilePicture(file), cls.name)
            else:
                yield Fault(str(file), None, f"ends in {file.suffix!r}, expected {', '.join(SUFFIXES)}")


def _visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder and is not hidden, in the order of names."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.glob(pattern) if not hidden(path))


def _of_idx(file: Path) -> Iterator[Found]:
    labels_at = labels_file(file)
    if not labels_at.exists():
        raise BadPlaceError(f"its labels are not there: expected {labels_at.name} beside it")
    try:
        images = read_idx(file, 3)
    except BadFileError as bad:
        raise BadPlaceError(str(bad)) from None
    try:
        labels = read_idx(labels_at, 1)
    except BadFileError as bad:
        raise BadPlaceError(f"its labels, {labels_at.name}: {bad}") from None
    if len(images) != len(labels):
        raise BadPlaceError(f"holds {len(images):,} images, {labels_at.name} {len(labels):,} labels")
    if len(images) == 0 or 0 in images.shape:
        raise BadPlaceError(f"holds {' x '.join(map(str, images.shape))} pixels, expected at least one image")
    for index, label in enumerate(labels.tolist()):
        yield Pointer(str(file), index, ArrayPicture(images, index), str(label))


def _of_rows(file: Path) -> Iterator[Found]:
    """Paths in a file of rows are relative to its folder."""
    count = 0
    for line, found in CONTAINERS[file.suffix](file):
        count += 1
        try:
            if isinstance(found, BadRowError):
                raise found
            picture, label = _named(found, file.parent)
            yield Pointer(str(file), line, picture, label)
        except BadFileError as bad:
            raise BadPlaceError(f"line {line}: {bad}") from None
        except BadRowError as bad:
            yield Fault(str(file), line, str(bad))
    if count == 0:
        raise BadPlaceError("the file holds no rows")


def _named(row: object, folder: Path) -> tuple[FilePicture, str]:
    if not isinstance(row, dict):
        raise BadRowError(f"got {kind(row)}, expected an object")
    column = _path_column(row)
    if LABEL_COLUMN not in row:
        raise BadRowError(f"no column {LABEL_COLUMN!r} among {', '.join(map(repr, row))}")
    return FilePicture(folder / text_of(row, column)), str(class_of(row, LABEL_COLUMN))


def _path_column(row: Json) -> str:
    found = [name for name in PATH_COLUMNS if name in row]
    if len(found) != 1:
        got = ", ".join(map(repr, found or row))
        raise BadRowError(
            f"got the columns {got}, expected the image's path in one of {', '.join(PATH_COLUMNS)}"
        )
    return found[0]
