"""A model folder to a folder in 4 bits, tensor by tensor: reading, quantising and writing at the same time.

It owns what is read for which place of the file, and that work which was interrupted goes on; it must not know the
file format, or how numbers are quantised.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.data.fingerprint import FILE as FINGERPRINT
from halfbyte.errors import ModelError
from halfbyte.model.direct import Stretch
from halfbyte.model.files import WEIGHTS, ModelFolder, open_model_folder
from halfbyte.model.journal import Journal
from halfbyte.model.linear4bit import features
from halfbyte.model.loading import (
    Progress,
    is_in_4bit,
    load_generation_config,
    place_4bit,
    read_4bit,
    refuse_other_kind,
    refuse_other_quantisation,
)
from halfbyte.model.matching import match, refuse_mostly_unquantised, wrong_tensors
from halfbyte.model.pieces import Piece, ReadAhead, cut
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
from halfbyte.quant.formats import entry_names
from halfbyte.quant.weight import QuantSpec, Weight4bit
from halfbyte.version import __version__

JOURNAL = "quantize.journal"
SYNC_BYTES = 1 << 28
WAITING_BYTES = 1 << 24
"""Of what was made and is not yet taken by the writer: beyond it, nothing more is made."""
"""So much is written before the disk is waited for."""


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
    pieces: tuple[Piece, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of the folder's tensors."""
        return sum(tensor.nbytes for tensor in self.folder.tensors.values())

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
    pieces = tuple(cut(found, tensors, layout, in_4bit))
    return Quantisation(folder, model, None if in_4bit else spec, layout, pieces)


def _state_alone(stored: StoredTensor) -> Tensor:
    """A part of a weight in 4 bits without its values, unless it says what the others are."""
    if is_state(stored.name):
        return stored.read()
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


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
            with FileWriter(partial / WEIGHTS, work.layout, finished) as writer, _threads_for(work.spec):
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


@contextmanager
def _threads_for(spec: QuantSpec | None) -> Iterator[None]:
    """Leave a processor to the digest, unless scales are searched for: only then do kernels take longer than it."""
    threads = torch.get_num_threads()
    if spec is None or spec.scales == "absmax":
        torch.set_num_threads(max(threads - 1, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stream(work: Quantisation, writer: FileWriter, journal: Journal, progress: Progress | None) -> None:
    """Read pieces while the one before is quantised and the one before that is written."""
    pieces = [piece for piece in work.pieces if piece.unit not in writer.sha256]
    total = sum(piece.nbytes for piece in work.pieces)
    done = total - sum(piece.nbytes for piece in pieces)
    record = _Recorder(work, writer, journal)
    with ReadAhead(pieces) as ahead, ThreadPoolExecutor(1) as scribe:
        waiting: deque[_Writing] = deque()
        for piece in pieces:
            while not ahead:
                waiting.popleft().settled(ahead)
            got, held = ahead.next()
            made = piece.made(got, work.spec)
            if becomes_4bit := piece.becomes_4bit(work.spec):
                ahead.give_back(held)
            while sum(writing.nbytes for writing in waiting) > WAITING_BYTES:
                waiting.popleft().settled(ahead)
            nbytes = sum(tensor.nbytes for tensor in made.values())
            written = scribe.submit(record.put, piece, made)
            waiting.append(_Writing(written, None if becomes_4bit else held, nbytes))
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
        for writing in waiting:
            writing.settled(ahead)


class _Writing(NamedTuple):
    """A piece that is being written, and the memory that is held until it is: where it is written as it was read."""

    written: Future[None]
    held: Stretch | None
    nbytes: int

    def settled(self, ahead: ReadAhead) -> None:
        self.written.result()
        if self.held is not None:
            ahead.give_back(self.held)


class _Recorder:
    """Writes what was made, and says in the journal which units are finished."""

    def __init__(self, work: Quantisation, writer: FileWriter, journal: Journal) -> None:
        self._work, self._writer, self._journal = work, writer, journal
        self._unsynced = 0

    def put(self, piece: Piece, made: Mapping[str, Tensor]) -> None:
        """Write a piece."""
        for name, tensor in made.items():
            offset = piece.offset * tensor.element_size() if name == piece.name else 0
            self._writer.put(name, tensor, offset)
        if piece.unit != REST and piece.unit in self._writer.sha256:
            self._writer.then(partial(self._note, piece.unit))

    def _note(self, unit: str) -> None:
        """Say in the journal that a unit is in the file; and from time to time have both on the disk."""
        extent, sha256 = self._work.layout.units[unit], self._writer.sha256[unit]
        self._journal.add(_facts(self._writer.file, self._work.layout, unit, sha256))
        self._unsynced += extent.end - extent.begin
        if self._unsynced >= SYNC_BYTES:
            self._writer.sync()
            self._journal.sync()
            self._unsynced = 0
