"""The file of a model in 4 bits: where each tensor lies, and the digests by which its parts are known again.

It owns the layout and what is said of a file that was cut, edited or exchanged; it must not know how weights are
quantised, or who writes and reads the bytes.

The layout lets a reader take one layer at a time: first the `rest`, all that is small, then the embeddings, then the
matrices of layer after layer in the order of use, then the output head. Each of these units is one stretch of bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfbyte.data.fingerprint import FILE
from halfbyte.errors import ModelError
from halfbyte.model.files import WEIGHTS, contained, read_json
from halfbyte.model.mapped import Extent
from halfbyte.model.stored import DTYPES
from halfbyte.quant.formats import STATE_PREFIX

KEY = "weights"
"""Where the digests stand in the facts beside a model."""
REST, EMBED, HEAD = "rest", "embed", "head"
PAGE = 4096
ALIGNMENT = 64
_READ_BYTES = 1 << 24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_QUANTISE_AGAIN = "get the folder again, or quantise the model again"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything in a file lies.

    Attributes:
        header: The file's first bytes, up to the first tensor.
        tensors: Tensor name → its bytes in the file, in their order.
        units: Unit name → its bytes in the file, in their order, without a gap from header to end.
        unit_of: Tensor name → the unit it lies in.
    """

    header: bytes
    tensors: Mapping[str, Extent]
    units: Mapping[str, Extent]
    unit_of: Mapping[str, str]

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return max(extent.end for extent in self.units.values())

    @property
    def header_sha256(self) -> str:
        """SHA-256 of the header, in hexadecimal."""
        return hashlib.sha256(self.header).hexdigest()


def lay_out(tensors: Mapping[str, Tensor], unit_of: Mapping[str, str]) -> Layout:
    """Give every tensor its place.

    Data begins at a multiple of 4,096 bytes, and so does what follows the `rest`: the last quantisation state, which
    is JSON, is filled up with blanks. Within a unit tensors keep their order; in the `rest` those come first whose
    lengths keep the next one aligned. Matrices are aligned to 64 bytes where their lengths are multiples of 64.

    Args:
        tensors: Tensor name → the tensor, with or without values, in the order of use; a quantisation state is among
            them.
        unit_of: Tensor name → unit: `rest`, `embed`, `head`, or the name of a layer.

    Source: https://github.com/huggingface/safetensors#format
    """
    units = [*dict.fromkeys((REST, EMBED, *(u for u in unit_of.values() if u != HEAD), HEAD))]
    order = sorted(tensors, key=lambda name: units.index(unit_of[name]))
    rest = sorted((n for n in order if unit_of[n] == REST), key=lambda name: _in_rest(name, tensors[name]))
    order = rest + [name for name in order if unit_of[name] != REST]
    lengths = {name: tensors[name].nbytes for name in order}
    lengths[rest[-1]] += -sum(lengths[name] for name in rest) % PAGE
    ends = dict(zip(order, _running_sum(lengths.values()), strict=True))
    header = _header({name: (tensors[name], ends[name] - lengths[name], ends[name]) for name in order})
    places = {
        name: Extent(len(header) + ends[name] - lengths[name], len(header) + ends[name]) for name in order
    }
    extents: dict[str, Extent] = {}
    for name, place in places.items():
        first = extents.get(unit_of[name], place)
        extents[unit_of[name]] = Extent(first.begin, place.end)
    return Layout(header, places, extents, {name: unit_of[name] for name in order})


def _in_rest(name: str, tensor: Tensor) -> tuple[bool, bool, int]:
    return is_state(name), tensor.nbytes % ALIGNMENT != 0, -tensor.element_size()


def is_state(name: str) -> bool:
    """Whether a tensor is the JSON of a quantisation state, which blanks may follow."""
    return f".{STATE_PREFIX}" in name


def _running_sum(lengths: Iterable[int]) -> Iterable[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


def _header(places: Mapping[str, tuple[Tensor, int, int]]) -> bytes:
    """The header of a safetensors file, padded with blanks to a multiple of 4,096 with the length before it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (tensor, begin, end) in places.items():
        shape = [end - begin] if is_state(name) else list(tensor.shape)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class Digests:
    """What a file was when it was written.

    Attributes:
        file: The file.
        file_bytes: Its length.
        header_sha256: Of all before the first unit.
        units: Unit name → its bytes in the file, and their SHA-256 in hexadecimal.
    """

    file: Path
    file_bytes: int
    header_sha256: str
    units: Mapping[str, tuple[Extent, str]]

    def as_dict(self) -> dict[str, Any]:
        """The facts that `read_digests` reads back."""
        units = {
            name: {"begin": extent.begin, "end": extent.end, "sha256": sha256}
            for name, (extent, sha256) in self.units.items()
        }
        facts = {"file_bytes": self.file_bytes, "header_sha256": self.header_sha256, "units": units}
        return {KEY: facts}

    def check(self, unit: str, data: bytes | memoryview) -> None:
        """Refuse bytes of a unit that are not those that were written.

        Raises:
            ModelError: HB359.
        """
        self._check(unit, hashlib.sha256(data).hexdigest())

    def check_stored(self, unit: str) -> None:
        """Read a unit, and refuse it if it is not what was written.

        Raises:
            ModelError: HB359.
        """
        self._check(unit, digest_of(self.file, self.units[unit][0]))

    def check_file(self) -> None:
        """Refuse the file if it was cut, or if its header or its small tensors are others; the rest is not read.

        Raises:
            ModelError: HB358 for the file as such, HB359 for the small tensors.
        """
        size = self.file.stat().st_size
        if size != self.file_bytes:
            raise self._changed(f"expected {self.file_bytes:,} bytes, found {size:,}")
        with self.file.open("rb") as stream:
            found = _digest_of(stream, Extent(0, self._data_begin))
            if found != self.header_sha256:
                raise self._changed(f"expected a header of SHA-256 {self.header_sha256}, found {found}")
            self._check(REST, _digest_of(stream, self.units[REST][0]))

    def check_all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the whole file, and refuse it at the first unit that is not what was written.

        Raises:
            ModelError: HB358 or HB359.
        """
        self.check_file()
        with self.file.open("rb") as stream:
            for unit, (extent, _) in self.units.items():
                self._check(unit, _digest_of(stream, extent))
                if progress is not None:
                    progress(extent.end, self.file_bytes)

    @property
    def _data_begin(self) -> int:
        return self.units[REST][0].begin

    def _check(self, unit: str, found: str) -> None:
        extent, expected = self.units[unit]
        if found != expected:
            raise ModelError(
                "HB359",
                f"{unit} (bytes {extent.begin:,} to {extent.end:,}) has SHA-256 {found}, expected {expected}",
                where=str(self.file),
                fix=_QUANTISE_AGAIN,
            )

    def _changed(self, what: str) -> ModelError:
        return ModelError("HB358", what, where=str(self.file), fix=_QUANTISE_AGAIN)


def read_digests(folder: Path) -> Digests | None:
    """The digests beside a model in 4 bits; None where there are none, as in folders that others made.

    Raises:
        ModelError: HB365 for digests that contradict themselves or cannot be read, HB305 for a file outside of the
            folder.
    """
    if not (folder / FILE).exists():
        return None
    file = contained(folder, FILE)
    try:
        facts = read_json(file).get(KEY)
    except ModelError as error:
        raise ModelError("HB365", error.what, where=str(file), fix=error.fix) from error
    if facts is None:
        return None
    try:
        stored = sorted(facts["units"].items(), key=lambda named: int(named[1]["begin"]))
        units = {
            name: (Extent(int(unit["begin"]), int(unit["end"])), str(unit["sha256"])) for name, unit in stored
        }
        found = Digests(
            contained(folder, WEIGHTS), int(facts["file_bytes"]), str(facts["header_sha256"]), units
        )
    except (AttributeError, KeyError, TypeError, ValueError) as fault:
        what = f"{KEY!r} is not what halfbyte quantize writes: {type(fault).__name__}: {fault}"
        raise ModelError("HB365", what, where=str(file), fix=_QUANTISE_AGAIN) from fault
    extents = sorted(extent for extent, _ in units.values())
    gaps = any(before.end != after.begin for before, after in pairwise(extents))
    if REST not in units or gaps or units[REST][0] != extents[0] or extents[-1].end != found.file_bytes:
        what = f"the units under {KEY!r} do not cover the file's {found.file_bytes:,} bytes"
        raise ModelError("HB365", what, where=str(file), fix=_QUANTISE_AGAIN)
    return found


def refuse_changed_file(folder: Path) -> None:
    """Refuse a folder whose file of weights is not the one that its digests were taken of.

    Only the file's length, its header and its small tensors are looked at: a fraction of a second for any model.

    Raises:
        ModelError: HB358, HB359, HB365, or HB305.
    """
    digests = read_digests(folder)
    if digests is not None and digests.file.is_file():
        digests.check_file()


def digest_of(file: Path, extent: Extent) -> str:
    """SHA-256 of a stretch of a file, in hexadecimal; of what there is of it in a shorter file."""
    with file.open("rb") as stream:
        return _digest_of(stream, extent)


def _digest_of(stream: BinaryIO, extent: Extent) -> str:
    digest = hashlib.sha256()
    left = extent.end - extent.begin
    view = memoryview(bytearray(min(_READ_BYTES, left)))
    stream.seek(extent.begin)
    while left and (got := stream.readinto(view[: min(left, _READ_BYTES)])):  # type: ignore[attr-defined]
        digest.update(view[:got])
        left -= got
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, in the order of its elements; they are its own where it is contiguous."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
