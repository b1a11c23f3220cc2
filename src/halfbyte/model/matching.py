"""Which stored tensor fills which place of a model, before any is read.

It owns what a folder has over or short, and what begins anew; it must not know how tensors are read or held.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NoReturn

from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.beside import outside
from halfbyte.model.files import ModelFolder
from halfbyte.model.purpose import Head, head_modules, is_of_another_head, may_begin
from halfbyte.model.skeleton import Slot, slots
from halfbyte.model.stored import StoredTensor
from halfbyte.model.stored_names import StoredNames
from halfbyte.quant.formats import entry_names, quantised_names

# Buffers that older versions of transformers wrote into files and newer ones compute.
_COMPUTED = (r"(^|\.)rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$", r"(^|\.)position_ids$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One weight of a file and the place it fills: one tensor, or the several of a weight in 4 bits."""

    slot: Slot
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def is_4bit(self) -> bool:
        """Whether it is a weight in 4 bits."""
        return len(self.stored) > 1

    @property
    def only(self) -> StoredTensor:
        """The tensor, of a weight that is one."""
        (tensor,) = self.stored.values()
        return tensor


def match(
    folder: ModelFolder, model: PreTrainedModel, head: Head | None = None
) -> tuple[list[Entry], list[str]]:
    """Pair what is stored with what the model wants, and refuse the folder if anything is over or short.

    Returns:
        What is to be read, and the names of modules that begin anew.

    Raises:
        ModelError: HB308 missing, HB309 unexpected, HB310 of another shape.
    """
    places = {name: slot for slot in slots(model) for name in slot.names}
    anew, stored_names = _Anew(folder, model, head), StoredNames(model)
    in_4bit = quantised_names(folder.tensors)
    belongs = {part: weight for weight in in_4bit for part in entry_names(weight, folder.tensors)}
    entries: list[Entry] = []
    filled: set[str] = set()
    unexpected = []
    for stored in folder.tensors:
        if belongs.get(stored, stored) != stored:
            continue
        name = stored_names.in_model(stored, places)
        slot = None if anew.leaves_out(name) else places.get(name)
        names = entry_names(stored, folder.tensors) if stored in in_4bit else [stored]
        if slot is not None and (len(slot.names) > 1 or slot.names[0] not in filled):
            filled.update(slot.names)
            entries.append(Entry(slot, {name: folder.tensors[name] for name in names}))
        elif not anew.leaves_there(stored) and not _may_be_left_out(
            stored, getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        ):
            unexpected.append(stored)
    can_be_missing = getattr(model, "_keys_to_ignore_on_load_missing", None)
    fresh = anew.begin({name for name in places if name not in filled}, filled)
    missing = sorted(
        name
        for name, slot in places.items()
        if name not in filled
        and outside([name], fresh)
        and (slot.is_meta or slot.is_parameter or not _may_be_left_out(name, can_be_missing))
    )
    if missing:
        also = f"; not known to the model: {named(unexpected)}" if unexpected else ""
        wrong_tensors(folder, model, "HB308", f"{len(missing)} tensors are missing: {named(missing)}{also}")
    if unexpected:
        wrong_tensors(folder, model, "HB309", f"{len(unexpected)} tensors have no place: {named(unexpected)}")
    for entry in entries:
        if not entry.is_4bit and entry.only.shape != entry.slot.shape:
            what = f"{entry.only.name} is {entry.only.shape}, config.json says {entry.slot.shape}"
            wrong_tensors(folder, model, "HB310", what)
    return entries, fresh


@dataclass(frozen=True)
class _Anew:
    """Which parts of a model begin anew, and what of a folder belongs to the parts they replace."""

    folder: ModelFolder
    model: PreTrainedModel
    head: Head | None

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of the model is not to be taken from the folder: its head is for something else."""
        if self.head is None or self.head.is_stored(self.folder.config, self.model):
            return False
        return not outside([name], head_modules(self.model))

    def leaves_there(self, stored: str) -> bool:
        """Whether a stored tensor that has no place is of another head."""
        return self.head is not None and is_of_another_head(
            stored, self.model.base_model_prefix, self.folder.tensors
        )

    def begin(self, unfilled: set[str], filled: set[str]) -> list[str]:
        """The modules that begin anew: of head and pooler those of which the folder holds nothing."""
        if self.head is None:
            return []
        return [
            name
            for name in may_begin(self.model)
            if outside(list(unfilled), [name]) != list(unfilled)
            and len(outside(list(filled), [name])) == len(filled)
        ]


def _may_be_left_out(name: str, patterns: object) -> bool:
    own = [str(pattern) for pattern in patterns] if isinstance(patterns, set | list | tuple) else []
    return any(re.search(pattern, name) for pattern in (*_COMPUTED, *own))


def wrong_tensors(folder: ModelFolder, model: PreTrainedModel, code: str, what: str) -> NoReturn:
    """Refuse a folder whose tensors are not the model's."""
    raise ModelError(
        code,
        f"{what} (as {type(model).__name__})",
        where=str(folder.path),
        fix="fetch config.json and the weights again from one revision, or use a model saved from this class",
    )


def named(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def refuse_mostly_unquantised(where: str, wanted: list[Slot]) -> None:
    """Refuse a model most of whose weights are in no linear layer: it would be called 4-bit and be 16-bit.

    Args:
        where: The folder, for the message.
        wanted: Everything the model wants from its weights.

    Raises:
        ModelError: HB315.
    """
    matrices = [
        slot for slot in wanted if len(slot.shape) >= 2 and not slot.is_embedding and slot.is_parameter
    ]
    in_linear = sum(prod(slot.shape) for slot in matrices if slot.linear is not None)
    others = [slot for slot in matrices if slot.linear is None]
    elsewhere = sum(prod(slot.shape) for slot in others)
    if elsewhere > in_linear:
        largest = max(others, key=lambda slot: prod(slot.shape)).names[0]
        raise ModelError(
            "HB315",
            f"{elsewhere:,} of its weights are in no linear layer and would stay as they are ({largest}, …), "
            f"{in_linear:,} are",
            where=where,
            fix="load it without quantization, or use a model without fused experts",
        )
