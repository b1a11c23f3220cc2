"""Places of images to rows: every image is read whole once, every fault is named, nothing is kept but hashes.

It owns the reading and the judgement of sets of images; it must not know models or what they want of an image.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from halfbyte.data.faults import BadRowError, Fault, Faults, Reading
from halfbyte.data.images.decode import require_pillow
from halfbyte.data.images.places import BadPlaceError, Found, labelled_images
from halfbyte.data.images.row import FilePicture, ImageRow, Pointer, content_of
from halfbyte.data.labels import label_names
from halfbyte.errors import DataError, listed

Progress = Callable[[int, int], None]
"""Called with images read so far and images in all."""

AT_ONCE = 1024
"""Images waiting for a thread; bounds what is kept of those already read."""


def read_images(
    paths: str | Path | Sequence[str | Path],
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> list[ImageRow]:
    """Read all images of some places once, in order, and keep where they are, their labels and their hashes.

    Args:
        paths: Folders with a folder for each class, IDX files of images with their labels beside them, and files
            of rows with the columns `image` (or `file_name`, `image_path`) and `label`.
        reading: How many faulty images may be skipped; gets those that were.
        progress: Told how far reading is.

    Raises:
        DataError: HB215 without the package that reads image files; HB235 names every image that is not whole, too
            large or of another kind; HB236 every place that is none of these, or is damaged.
    """
    reading = reading or Reading()
    found = _all_places([Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)])
    if any(isinstance(each, Pointer) and isinstance(each.picture, FilePicture) for each in found):
        require_pillow()
    checked: list[ImageRow | Fault] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads, warnings.catch_warnings():
        # Pillow's, of what is judged here; set once, for all threads have one filter.
        warnings.simplefilter("ignore")
        for begin in range(0, len(found), AT_ONCE):
            checked += threads.map(_checked, found[begin : begin + AT_ONCE])
            if progress is not None:
                progress(len(checked), len(found))
    faults = Faults.of((each for each in checked if isinstance(each, Fault)), reading.allowed)
    if not reading.skip(faults):
        what = f"{len(faults)} of {len(found)} images" + reading.named(faults)
        raise DataError(
            "HB235", what, fix="mend or remove them; or allow some to be left out, data.skip_bad_rows"
        )
    return [each for each in checked if isinstance(each, ImageRow)]


def _all_places(paths: list[Path]) -> list[Found]:
    found: list[Found] = []
    faults: list[str] = []
    for path in paths:
        try:
            found += labelled_images(path)
        except BadPlaceError as bad:
            faults += [f"{path}: {line}" for line in str(bad).splitlines()]
    if faults:
        what = f"{len(faults)} fault(s)" + listed(faults)
        raise DataError("HB236", what, fix="name places of labelled images in data.train and data.eval")
    return found


def _checked(each: Found) -> ImageRow | Fault:
    """An image read whole, its pixels forgotten."""
    if isinstance(each, Fault):
        return each
    try:
        return ImageRow(each, content_of(each.picture.pixels()))
    except BadRowError as bad:
        named = (
            f"{each.picture.file}: "
            if isinstance(each.picture, FilePicture) and each.index is not None
            else ""
        )
        return Fault(each.source, each.index, f"{named}{bad}")


@dataclass(frozen=True)
class ImageReport:
    """What was counted in a set of images.

    Attributes:
        rows: Images, duplicates included.
        duplicates: Images whose pixels an earlier one has too.
        labels: Images per label.
    """

    rows: int
    duplicates: int
    labels: Mapping[str, int]

    @classmethod
    def of(cls, rows: Sequence[ImageRow]) -> ImageReport:
        """Count."""
        counts = Counter(row.label for row in rows)
        distinct = len({row.content for row in rows})
        return cls(len(rows), len(rows) - distinct, {label: counts[label] for label in label_names(counts)})


def refuse_two_labels(rows: Sequence[ImageRow], reading: Reading | None = None) -> list[ImageRow]:
    """The rows without those whose very pixels stand under another label too.

    Args:
        rows: To be trained on and held out, together.
        reading: How many faulty images may be skipped; gets those that were.

    Raises:
        DataError: HB238 naming each such image and its labels.
    """
    reading = reading or Reading()
    labels: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.content].add(row.label)
    faults = Faults.of(
        (
            Fault(
                row.source, row.pointer.index, f"the same picture is labelled {_named(labels[row.content])}"
            )
            for row in rows
            if len(labels[row.content]) > 1
        ),
        reading.allowed,
    )
    if not reading.skip(faults):
        what = f"{len(faults)} of {len(rows)} images" + reading.named(faults)
        raise DataError("HB238", what, fix="decide on one label for each, or remove them")
    return [row for row in rows if len(labels[row.content]) == 1]


def _named(labels: set[str]) -> str:
    ordered = label_names(labels)
    more = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(map(repr, ordered[:20])) + more
