"""Where the frozen weights of a model are while it computes: all in memory, or layer by layer from their file.

It owns which weights lie in mapped files, and the order in which layers' pages come and go; it must not know how a
layer computes or what its weights mean.

`resident`: every page is in memory from the start. `streamed`: while a layer computes, one thread reads the one that
comes next, forward or backward, and what lies behind is let go; two layers are in memory at once, beside the last one
the output head. A layer's visit in the backward pass serves its recomputation too, and the last layer, and the first
one of the next pass, are still there when the direction turns. Weights are the same bytes either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.blocks import repeated_layers
from halfbyte.model.mapped import Extent, MappedFile, can_let_go, extents_of
from halfbyte.model.quantised_file import HEAD, Digests
from halfbyte.model.stored import StoredTensor
from halfbyte.system import available_bytes

Residency = Literal["resident", "streamed"]

LEAST_BYTES = 16 * 1024
"""Smaller tensors are read: there are few, and they would keep pages of their neighbours in memory."""

LEAST_SHARE = 0.9
"""Of the layers' bytes, what must lie in mapped files for streaming to be worth its name."""

CACHED_SHARE = 0.5
"""Of the memory that is free when streaming begins, what the layers may be for the system's cache to keep them: then
only the first pass reads the disk. Larger ones are read past the cache."""

_STREAMER = "_halfbyte_streamer"  # attribute of a model that is streamed


class Part(NamedTuple):
    """Bytes of one file."""

    file: MappedFile
    extent: Extent


class Unit(NamedTuple):
    """What comes and goes together.

    Attributes:
        name: The layer's name in the model, or `head`.
        parts: Its bytes.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return sum(part.extent.end - part.extent.begin for part in self.parts)


@dataclass
class MappedWeights:
    """The weights of a model that lie in mapped files, as they are taken one by one.

    Args:
        residency: What is to become of their pages.
    """

    residency: Residency
    files: dict[Path, MappedFile] = field(default_factory=dict)
    taken: list[tuple[tuple[str, ...], StoredTensor]] = field(default_factory=list)
    _looked_through: int = 0

    def take(self, names: tuple[str, ...], stored: StoredTensor) -> Tensor:
        """A stored tensor: its place in the mapped file, or a copy where it is small or lies askew.

        Args:
            names: Names in the model of the weight that it is or belongs to.
            stored: The tensor.
        """
        if stored.nbytes < LEAST_BYTES:
            return stored.read()
        if stored.file not in self.files:
            self.files[stored.file] = MappedFile.open(stored.file)
        tensor = self.files[stored.file].tensor(stored)
        if tensor is None:
            return stored.read()
        self.taken.append((names, stored))
        if self.residency == "resident":
            for part in self._parts([stored]):
                part.file.bring(part.extent)
        return tensor

    def let_go(self) -> None:
        """Of weights that are streamed, let go of what was taken since the last call; it has been checked."""
        if self.residency == "streamed":
            for part in self._parts([stored for _, stored in self.taken[self._looked_through :]]):
                part.file.let_go(part.extent)
            self._looked_through = len(self.taken)

    def units(self, owners: dict[str, str]) -> dict[str, Unit]:
        """What comes and goes together, in the order of the owners; what belongs to none under an empty name.

        Args:
            owners: Prefix of weights' names → name of the unit.
        """
        found: dict[str, list[StoredTensor]] = {unit: [] for unit in (*owners.values(), "")}
        for names, stored in self.taken:
            inside = (
                unit for prefix, unit in owners.items() for name in names if name.startswith(f"{prefix}.")
            )
            found[next(inside, "")].append(stored)
        return {name: Unit(name, tuple(self._parts(tensors))) for name, tensors in found.items()}

    def _parts(self, tensors: list[StoredTensor]) -> list[Part]:
        by_file: dict[Path, list[StoredTensor]] = {}
        for tensor in tensors:
            by_file.setdefault(tensor.file, []).append(tensor)
        return [
            Part(self.files[file], extent) for file, those in by_file.items() for extent in extents_of(those)
        ]


class Streamer:
    """Brings the pages of a model's layers and lets them go, as the model visits them.

    Args:
        units: In the order of a forward pass.
        loose: Other mapped weights, such as an embedding of which each pass touches some rows.
        digests: What the file is to hold; a unit is held against it when its pages come for the first time.
        past_cache: Whether they are read past the system's cache.

    Attributes:
        visits: How often a layer was visited.
        brought_bytes: Bytes that were brought, from the disk or from the system's cache.
        waited_seconds: How long layers waited for their pages.
    """

    def __init__(
        self, units: list[Unit], loose: Unit, digests: Digests | None = None, past_cache: bool = False
    ) -> None:
        self.units, self.loose = units, loose
        self._read = MappedFile.fetch if past_cache else MappedFile.bring
        self._digests = digests
        known = digests.units if digests is not None else {}
        self._unchecked = {
            unit.name for unit in units if unit.name in known and unit.name != HEAD and unit.parts
        }
        self.visits = self.brought_bytes = 0
        self.waited_seconds = 0.0
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="halfbyte-read-ahead")
        self._held: dict[int, Future[None]] = {}
        self._last = -1

    def forward_visit(self, i: int) -> None:
        """The i-th unit is about to be used, in a forward pass or to be computed again."""
        again = i == self._last or i == self._last - 1
        self._visit(i, i - 1 if again and i else i + 1)
        if i == 0:
            self._reader.submit(self._let_go, self.loose)

    def backward_visit(self, i: int) -> None:
        """The i-th unit is about to be used in a backward pass."""
        self._visit(i, i - 1)

    def counts(self) -> dict[str, float]:
        """What was done so far, for a run's record."""
        return {
            "visits": self.visits,
            "brought_bytes": self.brought_bytes,
            "waited_seconds": self.waited_seconds,
        }

    def let_go(self) -> None:
        """Let go of everything, where the model is not used for a while."""
        for i in [*self._held]:
            del self._held[i]
            self._reader.submit(self._let_go, self.units[i])
        self._reader.submit(self._let_go, self.loose).result()
        for unit in self.units:
            for part in unit.parts:
                part.file.give_back()

    def _visit(self, i: int, following: int) -> None:
        if i not in self._held:
            self._held[i] = self._reader.submit(self._bring, self.units[i])
        began = time.perf_counter()
        self._held[i].result()
        self.waited_seconds += time.perf_counter() - began
        self.visits += 1
        self._last = i
        for other in [*self._held]:
            if other not in (i, following):
                del self._held[other]
                self._reader.submit(self._let_go, self.units[other])
        if 0 <= following < len(self.units) and following not in self._held:
            self._held[following] = self._reader.submit(self._bring, self.units[following])

    def _bring(self, unit: Unit) -> None:
        self._each_part(self._read, unit)
        self.brought_bytes += unit.nbytes
        if self._digests is not None and unit.name in self._unchecked:
            self._digests.check(unit.name, unit.parts[0].file.bytes_of(self._digests.units[unit.name][0]))
            self._unchecked.remove(unit.name)

    def _let_go(self, unit: Unit) -> None:
        self._each_part(MappedFile.let_go, unit)

    @staticmethod
    def _each_part(do: Callable[[MappedFile, Extent], None], unit: Unit) -> None:
        for part in unit.parts:
            do(part.file, part.extent)


def stream(model: PreTrainedModel, weights: MappedWeights, digests: Digests | None = None) -> None:
    """Have a model's layers come and go as they are visited.

    Args:
        model: Frozen, its weights taken from mapped files.
        weights: These.
        digests: What their file is to hold, where that is known. A layer that was changed is refused with HB359 when
            it is first visited.

    Raises:
        ModelError: HB370 where too little of it can be streamed, or the system cannot let pages go.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers = repeated_layers(model)
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    owners = {names[id(layer)]: names[id(layer)] for layer in layers}
    if isinstance(head, nn.Module):
        owners[names[id(head)]] = HEAD
    found = weights.units(owners)
    _refuse_too_little(model, layers, sum(found[names[id(layer)]].nbytes for layer in layers))
    loose = found.pop("")
    if digests is not None:
        visited = {unit.name for unit in found.values() if unit.name != HEAD and unit.parts}
        for name in digests.units.keys() - visited:
            digests.check_stored(name)
    past_cache = sum(unit.nbytes for unit in found.values()) > CACHED_SHARE * available_bytes()
    streamer = Streamer(list(found.values()), loose, digests, past_cache)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(_before, streamer.forward_visit, i))
        layer.register_forward_hook(partial(_after, streamer.backward_visit, i))
    setattr(model, _STREAMER, streamer)


def streamer_of(model: PreTrainedModel) -> Streamer | None:
    """What brings a model's layers, or None for a model that is not streamed."""
    found = getattr(model, _STREAMER, None)
    return found if isinstance(found, Streamer) else None


def described_residency(model: PreTrainedModel) -> str:
    """Where the base is, in a few words."""
    streamer = streamer_of(model)
    if streamer is None:
        return "the base is in memory"
    layers = max(unit.nbytes for unit in streamer.units)
    whole = sum(unit.nbytes for unit in (*streamer.units, streamer.loose))
    return (
        f"the base is streamed: two layers of {layers / 1e9:.2f} GB in memory, of {whole / 1e9:.2f} GB in all"
    )


def _before(visit: Callable[[int], None], i: int, module: nn.Module, args: Any) -> None:
    visit(i)


def _after(visit: Callable[[int], None], i: int, module: nn.Module, args: Any, output: Any) -> None:
    """Have the gradient of a layer's output announce its backward pass."""
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, Tensor) and first.requires_grad:
        first.register_hook(lambda _: visit(i))  # type: ignore[no-untyped-call]


def _refuse_too_little(model: PreTrainedModel, layers: list[nn.Module], mapped: int) -> None:
    if not can_let_go():
        what = "this system gives no pages back before a process ends"
        fix = "leave residency at auto or resident"
    else:
        held = sum(
            tensor.nbytes
            for layer in layers
            for tensor in (*layer.parameters(), *layer.buffers())
            if tensor.device.type == "cpu"
        )
        if layers and mapped >= LEAST_SHARE * held:
            return
        dtype = str(torch.get_default_dtype() if model.dtype is None else model.dtype).removeprefix("torch.")
        what = f"of the {held:,} bytes of its layers, {mapped:,} lie in its files as they are computed with ({dtype})"
        fix = "write it in 4 bits first (halfbyte quantize), or compute in the dtype it is stored in"
    raise ModelError("HB370", what, where=str(model.name_or_path), fix=fix)
