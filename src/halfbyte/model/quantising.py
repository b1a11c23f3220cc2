"""A model folder to a folder in 4 bits, tensor by tensor: reading, quantising and writing at the same time.

It owns what is read for which place of the file, and that work which was interrupted goes on; it must not know the
file format, or how numbers are quantised.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.data.fingerprint import FILE as FINGERPRINT
from halfbyte.errors import KernelError, ModelError
from halfbyte.model.files import WEIGHTS, ModelFolder, open_model_folder
from halfbyte.model.journal import Journal
from halfbyte.model.linear4bit import features
from halfbyte.model.loading import (
    Progress,
    check_tied,
    is_in_4bit,
    load_generation_config,
    place_4bit,
    quantised,
    read_4bit,
    refuse_not_finite,
    refuse_other_kind,
    refuse_other_quantisation,
)
from halfbyte.model.matching import Entry, match, refuse_mostly_unquantised, wrong_tensors
from halfbyte.model.precision import stored_dtype
from halfbyte.model.quantised_file import (
    REST,
    Digests,
    Layout,
    digest_of,
    is_state,
    lay_out,
    refuse_changed_file,
)
from halfbyte.model.quantised_writer import FileWriter
from halfbyte.model.same_base import base_digest
from halfbyte.model.saving import (
    entries,
    put_in_place,
    refuse_foreign_files,
    remove_remains,
    units_of,
    write_origin,
    write_settings,
)
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.stored import StoredTensor
from halfbyte.quant.formats import entry_names, to_bitsandbytes
from halfbyte.quant.weight import QuantSpec, Weight4bit
from halfbyte.version import __version__

JOURNAL = "quantize.journal"
PIECE_BYTES = 1 << 24
SYNC_BYTES = 1 << 28
"""So much is written before the disk is waited for."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is read at once: a weight that is quantised, or so much of a tensor that is kept as it is.

    Attributes:
        name: Where it goes: of a weight in 4 bits, its codes.
        unit: The unit of that place.
        entry: What the folder holds for that place; None where it holds nothing.
        stored: The bytes that are read; None for a weight that is stored in 4 bits.
        twins: The same bytes under other names, which must be equal.
        offset: Elements of the tensor before these.
        value: What the model computes by itself and no folder holds.
    """

    name: str
    unit: str
    entry: Entry | None = None
    stored: StoredTensor | None = None
    twins: tuple[tuple[Entry, StoredTensor], ...] = ()
    offset: int = 0
    value: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        if self.stored is None:
            return self.entry.nbytes if self.entry is not None else 0
        return self.stored.nbytes * (1 + len(self.twins))


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What is to be done with a folder, known before anything of it is read but names and shapes.

    Attributes:
        folder: The source.
        model: Without values; its linear layers are in 4 bits.
        spec: How weights are quantised; None where the folder holds them so.
        layout: The file to be.
        pieces: What is read, in the order in which it is written.
    """

    folder: ModelFolder
    model: PreTrainedModel
    spec: QuantSpec | None
    layout: Layout
    pieces: tuple[_Piece, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the folder's tensors."""
        return sum(tensor.nbytes for tensor in self.folder.tensors.values())

    def becomes_4bit(self, piece: _Piece) -> bool:
        """Whether a piece is a weight that is quantised."""
        entry = piece.entry
        return self.spec is not None and entry is not None and entry.slot.linear is not None

    @property
    def identity(self) -> dict[str, Any]:
        """What an interrupted quantisation must have been of, to go on with it."""
        return {
            "version": __version__,
            "source": base_digest(self.model),
            "files": self.stamps,
            "settings": None if self.spec is None else asdict(self.spec),
            "header": self.layout.header_sha256,
        }

    @property
    def stamps(self) -> dict[str, list[int]]:
        """Size and time of each file of the source."""
        files = {tensor.file: tensor.file.stat() for tensor in self.folder.tensors.values()}
        return {file.name: [facts.st_size, facts.st_mtime_ns] for file, facts in sorted(files.items())}

    def partial(self, target: Path) -> Path:
        """The folder that holds the work while it goes on, beside the target."""
        return target.parent / f"{target.name}.partial"

    def disk_bytes(self, target: Path) -> tuple[int, int]:
        """Bytes still needed on the target's disk, and bytes that are free there."""
        file = self.partial(target) / WEIGHTS
        there = getattr(file.stat(), "st_blocks", 0) * 512 if file.is_file() else 0
        parent = next(folder for folder in (target, *target.parents) if folder.is_dir())
        return max(self.layout.file_bytes - there, 0), shutil.disk_usage(parent).free


def prepare(source: str | Path, spec: QuantSpec) -> Quantisation:
    """Find out what quantising a folder takes, with every check that can be made without reading its weights.

    Args:
        source: Folder of a model that writes, in 16 or 32 bits; one in 4 bits is laid out anew.
        spec: How its linear layers are quantised; of a folder in 4 bits, how they are.

    Raises:
        ModelError: As `load`.
    """
    refuse_changed_file(Path(source))
    folder = open_model_folder(source)
    in_4bit = is_in_4bit(folder)
    model = build_skeleton(folder, stored_dtype(folder))
    found, _ = match(folder, model)
    if any(entry.is_4bit for entry in found) != in_4bit:
        what = "config.json and the weights disagree on whether they are in 4 bits"
        wrong_tensors(folder, model, "HB314", what)
    if not in_4bit:
        refuse_mostly_unquantised(str(folder.path), [entry.slot for entry in found])
    for entry in found:
        if entry.is_4bit:
            place_4bit(model, entry.slot, read_4bit(entry, _state_alone))
        elif entry.slot.linear is not None and not in_4bit:
            blank = Weight4bit.blank(features(entry.slot.linear), entry.slot.dtype, spec)
            place_4bit(model, entry.slot, blank)
        if not entry.is_4bit:
            refuse_other_kind(entry)
    if in_4bit:
        refuse_other_quantisation(folder, model, spec)
    load_generation_config(folder, model)
    tensors = entries(model)
    layout = lay_out(tensors, units_of(model, tensors))
    pieces = tuple(_pieces(found, tensors, layout, in_4bit))
    return Quantisation(folder, model, None if in_4bit else spec, layout, pieces)


def _state_alone(stored: StoredTensor) -> Tensor:
    """A part of a weight in 4 bits without its values, unless it says what the others are."""
    if is_state(stored.name):
        return stored.read()
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _pieces(
    found: list[Entry], tensors: Mapping[str, Tensor], layout: Layout, in_4bit: bool
) -> Iterator[_Piece]:
    """Everything that is written, in the order of its places."""
    stored: dict[str, list[Entry]] = {}
    for entry in found:
        stored.setdefault(entry.slot.names[0], []).append(entry)
    written = {part for name in stored for part in entry_names(name, layout.tensors)}
    for name, unit in layout.unit_of.items():
        if name in stored:
            first, *others = stored[name]
            if first.is_4bit or (first.slot.linear is not None and not in_4bit):
                yield _Piece(name, unit, first, None if first.is_4bit else first.only)
                continue
            each = PIECE_BYTES // first.only.dtype.itemsize
            count = prod(first.slot.shape)
            for offset in range(0, count, each):
                length = min(each, count - offset)
                twins = tuple((twin, twin.only.piece(offset, length)) for twin in others)
                yield _Piece(name, unit, first, first.only.piece(offset, length), twins, offset)
        elif name not in written:
            yield _Piece(name, unit, value=tensors[name])


def quantise_folder(
    work: Quantisation,
    target: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Digests:
    """Carry a quantisation out: a folder that transformers with bitsandbytes loads, and `load` too.

    Memory for two of the largest weights is taken, and for what they become. What is finished is written down beside
    it: a process that was killed is gone on with by the same call, to the same bytes.

    Args:
        work: What is to be done.
        target: Where to; whole or not at all. The work goes on in `<target>.partial`.
        progress: Told how far it is.
        say: Told what is found of earlier work.

    Returns:
        What the file is.

    Raises:
        ModelError: HB311 for weights that are not finite, HB309 for tied ones that differ, HB314 for damaged ones in
            4 bits, HB316 when the target holds other files, HB362 for too little space, HB363 when the disk fails,
            HB364 when another process is at it, HB367 when the source changes.
    """
    target = Path(os.path.abspath(target))
    partial = work.partial(target)
    _refuse_targets(work, target, partial)
    identity = work.identity
    try:
        remove_remains(target.parent, target.name)
        partial.mkdir(parents=True, exist_ok=True)
        with Journal(partial / JOURNAL, identity) as journal:
            _begin(work, partial, journal, say or (lambda _: None))
            refuse_foreign_files(target, {file.name for file in partial.iterdir()} | {FINGERPRINT, WEIGHTS})
            _refuse_small_disk(work, target)
            (partial / WEIGHTS).touch()
            finished = _finished(partial / WEIGHTS, work.layout, journal)
            if finished and say is not None:
                parts = f"{len(finished)} of {len(work.layout.units) - 1} parts"
                say(f"{parts} were finished before, and are as they were")
            with FileWriter(partial / WEIGHTS, work.layout, finished) as writer:
                _stream(work, writer, journal, progress)
                digests = writer.finish()
            _refuse_other_source(work, identity["files"])
            write_origin(work.model, partial, identity["source"], digests)
        put_in_place(partial, target)
        (target / JOURNAL).unlink()
    except OSError as fault:
        raise _disk_failed(work, partial, fault) from fault
    return digests


def _refuse_targets(work: Quantisation, target: Path, partial: Path) -> None:
    if target == Path(os.path.abspath(work.folder.path)):
        what, where = "it is the model that is to be quantised", target
    elif partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        what, where = "it is not a folder of its own", partial
    elif partial.exists() and any(partial.iterdir()) and not (partial / JOURNAL).is_file():
        what, where = f"it holds files, and no {JOURNAL} that says what was begun in it", partial
    else:
        return
    raise ModelError("HB316", what, where=str(where), fix="choose a new folder, or move this one away")


def _begin(work: Quantisation, partial: Path, journal: Journal, say: Callable[[str], None]) -> None:
    """Leave what goes on from earlier work, and nothing of any other."""
    if journal.other:
        say(f"{partial} was begun with another {', '.join(journal.other)}: it begins anew")
    for file in partial.iterdir():
        if file.name != JOURNAL and not (file.name == WEIGHTS and journal.finished):
            file.unlink()
    write_settings(work.model, partial)


def _refuse_small_disk(work: Quantisation, target: Path) -> None:
    needed, free = work.disk_bytes(target)
    if needed > free:
        raise ModelError(
            "HB362",
            f"{needed:,} bytes are needed, {free:,} are free",
            where=str(target.parent),
            fix=f"free {needed - free:,} bytes, or choose a folder on another disk",
        )


def _refuse_other_source(work: Quantisation, before: Mapping[str, list[int]]) -> None:
    now = work.stamps
    if changed := [name for name in before if now[name] != before[name]]:
        raise ModelError(
            "HB367",
            f"{', '.join(changed)} changed in size or time while it was read",
            where=str(work.folder.path),
            fix="leave the model's files alone, and give the same command again",
        )


def _disk_failed(work: Quantisation, partial: Path, fault: OSError) -> ModelError:
    return ModelError(
        "HB363",
        f"the system says: {fault.strerror or fault}",
        where=str(fault.filename or partial),
        fix=f"make room for the file's {work.layout.file_bytes:,} bytes, and give the same command again: what is "
        f"finished stays in {partial}",
    )


def _finished(file: Path, layout: Layout, journal: Journal) -> dict[str, str]:
    """The units that are as the journal says, up to the first that is not; with their digests."""
    found: dict[str, str] = {}
    for unit, extent in layout.units.items():
        if unit == REST:
            continue
        said = journal.finished.get(unit)
        if said != _facts(file, layout, unit, digest_of(file, extent)):
            break
        found[unit] = said["sha256"]
    return found


def _facts(file: Path, layout: Layout, unit: str, sha256: str) -> dict[str, str]:
    """What the journal says of a unit: its digest, and that of what its weights have in the `rest`."""
    beside = hashlib.sha256()
    weights = [name for name, of in layout.unit_of.items() if of == unit]
    for part in (part for name in weights for part in entry_names(name, layout.tensors)):
        if layout.unit_of[part] == REST:
            beside.update(digest_of(file, layout.tensors[part]).encode())
    return {"part": unit, "sha256": sha256, "beside": beside.hexdigest()}


def _stream(work: Quantisation, writer: FileWriter, journal: Journal, progress: Progress | None) -> None:
    """Read a piece while the one before is quantised and the one before that is written."""
    pieces = [piece for piece in work.pieces if piece.unit not in writer.sha256]
    total = sum(piece.nbytes for piece in work.pieces)
    done = total - sum(piece.nbytes for piece in pieces)
    largest = max((piece.stored.nbytes for piece in pieces if piece.stored is not None), default=0)
    buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]
    record = _Recorder(work, writer, journal)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scribe:
        coming = reader.submit(_read, pieces[0], buffers[0], None) if pieces else None
        written: Future[None] | None = None
        for number, piece in enumerate(pieces):
            assert coming is not None
            got = coming.result()
            if number + 1 < len(pieces):
                in_use = written if number and not work.becomes_4bit(pieces[number - 1]) else None
                coming = reader.submit(_read, pieces[number + 1], buffers[(number + 1) % 2], in_use)
            made = _made(work, piece, got)
            if written is not None:
                written.result()
            written = scribe.submit(record.put, piece, made)
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
        if written is not None:
            written.result()


def _read(piece: _Piece, buffer: Tensor, in_use: Future[None] | None) -> Tensor | Weight4bit:
    """Read a piece once what was in the buffer is written."""
    if in_use is not None:
        in_use.result()
    if piece.value is not None:
        return piece.value
    if piece.stored is None:
        assert piece.entry is not None
        weight = read_4bit(piece.entry)
        for stored in piece.entry.stored.values():
            stored.drop_from_cache()
        return weight
    tensor = piece.stored.read(buffer)
    piece.stored.drop_from_cache()
    return tensor


def _made(work: Quantisation, piece: _Piece, got: Tensor | Weight4bit) -> dict[str, Tensor]:
    """What is written of a piece, by name."""
    if isinstance(got, Weight4bit):
        return to_bitsandbytes(piece.name, got)
    if piece.entry is None or piece.stored is None:
        return {piece.name: got}
    if work.becomes_4bit(piece):
        assert work.spec is not None
        try:
            return to_bitsandbytes(piece.name, quantised(piece.entry.slot, got, work.spec))
        except KernelError:
            refuse_not_finite(piece.stored.name, str(piece.stored.file), got)
            raise
    if got.is_floating_point():
        name, last = piece.stored.name, piece.offset + got.numel() - 1
        refuse_not_finite(f"{name} (elements {piece.offset:,} to {last:,})", str(piece.stored.file), got)
    kept = got.to(piece.entry.slot.dtype)
    for twin, stored in piece.twins:
        check_tied(twin, kept, stored.read())
    return {piece.name: kept}


class _Recorder:
    """Writes what was made, and says in the journal which units are finished."""

    def __init__(self, work: Quantisation, writer: FileWriter, journal: Journal) -> None:
        self._work, self._writer, self._journal = work, writer, journal
        self._unsynced = 0

    def put(self, piece: _Piece, made: Mapping[str, Tensor]) -> None:
        """Write a piece."""
        for name, tensor in made.items():
            offset = piece.offset * tensor.element_size() if name == piece.name else 0
            self._writer.put(name, tensor, offset)
            self._unsynced += tensor.nbytes
        unit = piece.unit
        if unit != REST and unit in self._writer.sha256:
            file = self._writer.file
            self._journal.add(_facts(file, self._work.layout, unit, self._writer.sha256[unit]))
            if self._unsynced >= SYNC_BYTES:
                self._writer.sync()
                self._journal.sync()
                self._unsynced = 0
