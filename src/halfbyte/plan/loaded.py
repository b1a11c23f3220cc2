"""A model as loading leaves it, made of tensors without memory: weights that are held, and those in mapped files.

It owns that imitation of loading, its passing buffers included; it must not know training or how memory adds up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.model.blocks import repeated_layers
from halfbyte.model.files import CONFIG, ModelFolder, open_model_folder, read_json, refuse_remote_code
from halfbyte.model.linear4bit import Linear4bit, features, is_conv1d
from halfbyte.model.loading import place_quantised
from halfbyte.model.matching import match
from halfbyte.model.residency import CACHED_SHARE, LEAST_BYTES, Residency
from halfbyte.model.skeleton import Slot, build_skeleton, slots
from halfbyte.plan.live import LiveBytes
from halfbyte.quant.weight import NESTED_BLOCKSIZE, QuantSpec, Weight4bit
from halfbyte.system import available_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.model.purpose import Head

BARE_DTYPE = torch.bfloat16
"""What the weights of a bare config.json are taken to be stored in."""


@dataclass(frozen=True)
class Stored:
    """A weight as it is stored.

    Attributes:
        slot: Its place.
        dtype: Of its numbers in the file; None for a weight in 4 bits.
    """

    slot: Slot
    dtype: torch.dtype | None

    @property
    def count(self) -> int:
        """Numbers."""
        return math.prod(self.slot.shape)


@dataclass(frozen=True)
class Base:
    """How the base is held.

    Attributes:
        spec: The 4-bit format; None leaves weights as they are stored.
        residency: Where weights are that are used as they are stored; None where all are read.
    """

    spec: QuantSpec | None
    residency: Residency | None


def open_for_plan(model: str | Path) -> ModelFolder:
    """A model folder, or a bare config.json with the folder it lies in.

    Raises:
        ModelError: As `model.files.open_model_folder`.
    """
    path = Path(model)
    folder = path.parent if path.name == CONFIG else path
    has_weights = any(folder.glob("*.safetensors")) if folder.is_dir() else True
    if path.name != CONFIG and has_weights:
        return open_model_folder(folder)
    if not (folder / CONFIG).is_file():
        return open_model_folder(folder)  # says what is wrong with it
    refuse_remote_code(folder)
    return ModelFolder(folder, read_json(folder / CONFIG), {})


def stored_in_4bit(folder: ModelFolder) -> bool:
    """Whether the folder holds its weights in 4 bits."""
    return "quantization_config" in folder.config


def weights_of(folder: ModelFolder, model: PreTrainedModel, head: Head | None = None) -> list[Stored]:
    """The weights in the order in which they are read, then what begins anew; of a bare config.json those that there
    would be."""
    in_4bit = stored_in_4bit(folder)
    if not folder.tensors:
        return [
            Stored(slot, None if in_4bit and slot.linear is not None else BARE_DTYPE) for slot in slots(model)
        ]
    entries, _ = match(folder, model, head)
    read = [Stored(entry.slot, None if entry.is_4bit else entry.only.dtype) for entry in entries]
    names = {name for entry in entries for name in entry.slot.names}
    anew = [slot for slot in slots(model) if slot.is_meta and names.isdisjoint(slot.names)]
    return read + [Stored(slot, slot.dtype) for slot in anew]


def load_without_memory(
    folder: ModelFolder, base: Base, dtype: torch.dtype, live: LiveBytes, head: Head | None = None
) -> PreTrainedModel:
    """The model that `model.loading.load` gives, counted while it is filled.

    Args:
        folder: Whose weights are not read.
        base: How it is held.
        dtype: Of everything that is not in 4 bits.
        live: Counts what is held; gets what lies in mapped files.
        head: What stands on an encoder; None for a model that writes.
    """
    model = build_skeleton(folder, dtype, head)
    weights = weights_of(folder, model, head)
    layers = {id(layer): i for i, layer in enumerate(repeated_layers(model))}
    owners = _owners(model, layers)
    mapped: dict[str, int] = {}
    with live, live.doing("load", "base"):
        passing = [w for w in weights if _passes(w, base)]
        largest = max((w.count * w.dtype.itemsize for w in passing if w.dtype), default=0)
        with live.doing("load", "buffers"):
            buffer = live.empty((largest,), torch.uint8)
        for weight in weights:
            is_mapped = base.residency is not None and not _passes(weight, base)
            unit = owners.get(weight.slot.names[0].rpartition(".")[0], "")
            found = _fill(model, weight, base, live, is_mapped)
            mapped[unit] = mapped.get(unit, 0) + found
            live.count.mapped[""] += found if base.residency == "resident" else 0
        del buffer
    if base.residency is not None or base.spec is not None:
        model.requires_grad_(False)
    of_head, loose = mapped.pop("head", 0), mapped.pop("", 0)
    live.layer_bytes = largest = max(mapped.values(), default=0)
    if base.residency == "streamed":
        with_head = largest + of_head
        if sum(mapped.values()) + of_head > CACHED_SHARE * available_bytes():
            with_head = max(
                with_head, 2 * largest
            )  # read past the cache: memory of a layer that left waits for another
        live.count.mapped = {"": 2 * largest, "loss": with_head, "load": max(largest, of_head, loose)}
    return model


def _owners(model: PreTrainedModel, layers: dict[int, int]) -> dict[str, str]:
    """Names of modules → the layer that they belong to, or `head`."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if id(module) in layers:
            found |= {f"{name}.{inner}".rstrip("."): name for inner, _ in module.named_modules()}
        elif module is model.get_output_embeddings():  # type: ignore[no-untyped-call]
            found[name] = "head"
    return found


def _passes(weight: Stored, base: Base) -> bool:
    """Whether it is read to be made into something else."""
    if weight.dtype is None:
        return False
    return (base.spec is not None and weight.slot.linear is not None) or weight.dtype != weight.slot.dtype


def _fill(model: PreTrainedModel, weight: Stored, base: Base, live: LiveBytes, is_mapped: bool) -> int:
    """Put a weight into its place; the bytes of it that lie in a mapped file."""
    slot = weight.slot
    if weight.dtype is None:
        return _place_4bit(model, slot, base.spec or QuantSpec(), live, is_mapped)
    if base.spec is not None and slot.linear is not None:
        place_quantised(model, slot, live.empty(slot.shape, weight.dtype, counted=False), base.spec)
        return 0
    nbytes = weight.count * slot.dtype.itemsize
    in_file = is_mapped and nbytes >= LEAST_BYTES
    held = live.empty(slot.shape, slot.dtype, counted=not in_file)
    value = nn.Parameter(held, requires_grad=held.is_floating_point()) if slot.is_parameter else held
    for name in slot.names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)
    return nbytes if in_file else 0


def _place_4bit(model: PreTrainedModel, slot: Slot, spec: QuantSpec, live: LiveBytes, is_mapped: bool) -> int:
    """Put a layer in 4 bits into its place; the bytes of it that lie in a mapped file."""
    assert slot.linear is not None
    in_file = 0
    parts: dict[str, Tensor] = {}
    for name, shape, dtype in _parts(features(slot.linear), spec):
        nbytes = math.prod(shape) * dtype.itemsize
        maps = is_mapped and nbytes >= LEAST_BYTES
        parts[name] = live.empty(shape, dtype, counted=not maps)
        in_file += nbytes if maps else 0
    weight = Weight4bit(
        shape=features(slot.linear), dtype=slot.dtype, format=spec.format, blocksize=spec.blocksize, **parts
    )
    name = slot.names[0].removesuffix(".weight")
    layer = Linear4bit(weight, None, from_conv1d=is_conv1d(slot.linear))
    layer.register_parameter("bias", slot.linear._parameters.get("bias"))
    model.set_submodule(name, layer)
    return in_file


def _parts(shape: tuple[int, int], spec: QuantSpec) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of a quantised weight's tensors, see `Weight4bit`."""
    numbers = math.prod(shape)
    blocks = -(-numbers // spec.blocksize)
    yield "codes", ((numbers + 1) // 2,), torch.uint8
    yield "scales", (blocks,), torch.uint8 if spec.double_quant else torch.float32
    yield "codebook", (16,), torch.float32
    if spec.double_quant:
        yield "nested_scales", (-(-blocks // NESTED_BLOCKSIZE),), torch.float32
        yield "nested_codebook", (256,), torch.float32
        yield "offset", (), torch.float32
