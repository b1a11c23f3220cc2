"""From a model folder to a transformers model, tensor by tensor, straight to 4 bits where asked.

It owns which stored tensor fills which place, and that no 16-bit model is ever held; it must not know how
kernels work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from halfbyte.errors import KernelError, ModelError
from halfbyte.kernels import ops
from halfbyte.model.adapters import load_adapter
from halfbyte.model.beside import outside, trained_modules
from halfbyte.model.files import ModelFolder, open_model_folder
from halfbyte.model.linear4bit import Linear4bit, features, is_conv1d
from halfbyte.model.purpose import Head, begin, head_modules, is_of_another_head, may_begin, unread_modules
from halfbyte.model.skeleton import Slot, build_skeleton, slots
from halfbyte.model.stored import StoredTensor
from halfbyte.model.stored_names import StoredNames
from halfbyte.quant.formats import entry_names, from_bitsandbytes, quantised_names
from halfbyte.quant.weight import QuantSpec, Scales, Weight4bit

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""

# Buffers that older versions of transformers wrote into files and newer ones compute.
_COMPUTED = (r"(^|\.)rotary_emb\.inv_freq$", r"\.(attn|attention)\.(masked_)?bias$", r"(^|\.)position_ids$")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One weight of a file and the place it fills: one tensor, or the several of a weight in 4 bits."""

    slot: Slot
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def is_4bit(self) -> bool:
        return len(self.stored) > 1

    @property
    def only(self) -> StoredTensor:
        (tensor,) = self.stored.values()
        return tensor


def load(
    path: str | Path,
    *,
    quantization: QuantSpec | None,
    dtype: torch.dtype,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
    head: Head | None = None,
) -> PreTrainedModel:
    """Load a model from a folder of safetensors.

    Each tensor is read, checked, put into its place or quantised, and forgotten before the next: the most
    memory used beyond the model's own is about twice the largest tensor. Embeddings and the output head keep
    `dtype`; all other linear layers, GPT-2's `Conv1D` among them, become `Linear4bit`.

    Args:
        path: Folder with `config.json` and safetensors; also one stored in bitsandbytes' 4-bit form.
        quantization: How linear layers are quantised. None leaves them as they are stored: in `dtype`, or in
            4 bits if the folder holds them so.
        dtype: Of everything that is not in 4 bits: float32, bfloat16 or float16.
        adapter: Folder of a LoRA adapter in PEFT's format to put on top.
        progress: Told how far reading is.
        head: What stands on an encoder, in float32; a head of its own is taken from the folder where that has these
            labels, and begins anew elsewhere. None for a model that writes.

    Returns:
        The model in evaluation mode. In 4 bits it is frozen; without quantization its parameters require
        gradients.

    Raises:
        ModelError: HB301 to HB315 for the folder, HB322 to HB325 for the adapter, HB350 for a model that is no
            encoder, HB351 for a head that neither folder nor adapter holds and that may not begin.
    """
    folder = open_model_folder(path)
    stored_in_4bit = _stored_in_4bit(folder)
    model = build_skeleton(folder, dtype, head)
    entries, fresh = _match(folder, model, head)
    if any(entry.is_4bit for entry in entries) != stored_in_4bit:
        _wrong_tensors(
            folder, model, "HB314", "config.json and the weights disagree on whether they are in 4 bits"
        )
    if quantization is not None and not stored_in_4bit:
        refuse_mostly_unquantised(str(folder.path), [entry.slot for entry in entries])
    _fill(model, entries, None if stored_in_4bit else quantization, progress)
    if stored_in_4bit:
        _refuse_other_quantisation(folder, model, quantization)
    begin(model, fresh, head.seed or 0 if head is not None else 0)
    _refuse_unfilled(folder, model)
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        model.requires_grad_(False)
    _load_generation_config(folder, model)
    if adapter is not None:
        load_adapter(model, Path(adapter))
    if head is not None and head.seed is None:
        untrained = outside(fresh, unread_modules(model))
        _refuse_untrained(folder, set(untrained) - trained_modules(model).keys())
    model.train(False)
    return model


def _load_generation_config(folder: ModelFolder, model: PreTrainedModel) -> None:
    file = folder.path / "generation_config.json"
    if not file.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    except Exception as fault:  # any of transformers' own; it is told, with its cause, not hidden
        raise ModelError("HB301", str(fault), where=str(file), fix="correct or remove the file") from fault


def _stored_in_4bit(folder: ModelFolder) -> bool:
    """Whether the weights are stored in bitsandbytes' 4-bit form; any other form but plain is refused."""
    stored = folder.config.get("quantization_config")
    if stored is None:
        return False
    settings = stored if isinstance(stored, Mapping) else {"quant_method": stored}
    method = settings.get("quant_method")
    if method == "bitsandbytes" and settings.get("load_in_4bit", settings.get("_load_in_4bit")) is True:
        return True
    raise ModelError(
        "HB314",
        f"the weights are stored by {method!r} in another form than bitsandbytes' 4 bits",
        where=str(folder.path / "config.json"),
        fix="use the model's 16-bit folder",
    )


def _match(
    folder: ModelFolder, model: PreTrainedModel, head: Head | None = None
) -> tuple[list[_Entry], list[str]]:
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
    entries: list[_Entry] = []
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
            entries.append(_Entry(slot, {name: folder.tensors[name] for name in names}))
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
        also = f"; not known to the model: {_named(unexpected)}" if unexpected else ""
        _wrong_tensors(folder, model, "HB308", f"{len(missing)} tensors are missing: {_named(missing)}{also}")
    if unexpected:
        _wrong_tensors(
            folder, model, "HB309", f"{len(unexpected)} tensors have no place: {_named(unexpected)}"
        )
    for entry in entries:
        if not entry.is_4bit and entry.only.shape != entry.slot.shape:
            what = f"{entry.only.name} is {entry.only.shape}, config.json says {entry.slot.shape}"
            _wrong_tensors(folder, model, "HB310", what)
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


def _wrong_tensors(folder: ModelFolder, model: PreTrainedModel, code: str, what: str) -> NoReturn:
    raise ModelError(
        code,
        f"{what} (as {type(model).__name__})",
        where=str(folder.path),
        fix="fetch config.json and the weights again from one revision, or use a model saved from this class",
    )


def _named(names: list[str]) -> str:
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


def _fill(
    model: PreTrainedModel, entries: list[_Entry], quantization: QuantSpec | None, progress: Progress | None
) -> None:
    """Read every entry into its place; what is only passing through shares one buffer."""

    def passes_through(entry: _Entry) -> bool:
        to_4bit = quantization is not None and entry.slot.linear is not None
        return not entry.is_4bit and (to_4bit or entry.only.dtype != entry.slot.dtype)

    largest = max((entry.nbytes for entry in entries if passes_through(entry)), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    total, done = sum(entry.nbytes for entry in entries), 0
    filled: dict[tuple[str, ...], Tensor] = {}
    for entry in entries:
        if entry.is_4bit:
            _place_4bit(model, entry.slot, _read_4bit(entry))
        else:
            tensor = entry.only.read(buffer if passes_through(entry) else None)
            _check_values(entry, tensor)
            if quantization is not None and entry.slot.linear is not None:
                place_quantised(model, entry.slot, tensor, quantization)
            elif entry.slot.names in filled:
                _check_tied(entry, filled[entry.slot.names], tensor)
            else:
                filled[entry.slot.names] = _place(model, entry.slot, tensor)
        done += entry.nbytes
        if progress is not None:
            progress(done, total)


def _check_values(entry: _Entry, tensor: Tensor) -> None:
    """Refuse NaN and Inf, and numbers of another kind than the model computes with."""
    stored = entry.only
    if stored.dtype.is_floating_point != entry.slot.dtype.is_floating_point:
        raise ModelError(
            "HB310",
            f"{stored.name} is stored as {stored.dtype}, the model computes in {entry.slot.dtype}",
            where=str(stored.file),
            fix="use the model's 16-bit folder; this one may be quantised by another tool",
        )
    if tensor.is_floating_point() and tensor.numel():
        refuse_not_finite(stored.name, str(stored.file), tensor)


def refuse_not_finite(name: str, where: str, tensor: Tensor) -> None:
    """Refuse a stored tensor that holds NaN or Inf: HB311."""
    least, most = torch.aminmax(tensor)  # NaN comes through; no second tensor is made
    if not (torch.isfinite(least) and torch.isfinite(most)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            "HB311",
            f"{name} holds {bad:,} values that are NaN or infinite, of {tensor.numel():,}",
            where=where,
            fix="fetch the weights again; if they stay so, the model was saved after its training failed",
        )


def place_quantised(model: PreTrainedModel, slot: Slot, tensor: Tensor, spec: QuantSpec) -> None:
    """Quantise the weight of a linear layer and put the layer of 4 bits in its place.

    Args:
        model: The model that is being filled.
        slot: The weight's place, in a layer that may be replaced.
        tensor: As it is stored: (N, K), or (K, N) for a `Conv1D`.
        spec: How it is quantised.
    """
    assert slot.linear is not None
    if is_conv1d(slot.linear):
        tensor = tensor.T.contiguous()  # (K, N) -> (N, K)
    weight = ops.quantize_4bit(tensor.float() if tensor.dtype == torch.float64 else tensor, spec)
    _place_4bit(model, slot, replace(weight, dtype=slot.dtype), spec.scales)


def _read_4bit(entry: _Entry) -> Weight4bit:
    """A weight that is stored in 4 bits, of the shape its layer has."""
    name, first = next(iter(entry.stored.items()))
    read = {part: tensor.read() for part, tensor in entry.stored.items()}
    read[name] = read[name].reshape(-1).view(torch.uint8)  # codes may be stored in wider elements
    try:
        weight = from_bitsandbytes(name, read)
    except KernelError as fault:
        fix = "quantise the model again"
        raise ModelError("HB314", fault.what, where=f"{first.file}, {name}", fix=fix) from fault
    linear = entry.slot.linear
    if linear is None or weight.shape != features(linear):
        expected = f"a linear layer of {features(linear)}" if linear is not None else "no linear layer"
        what = f"{name} is a 4-bit weight of {weight.shape}, the model has {expected} there"
        raise ModelError(
            "HB314", what, where=str(first.file), fix="quantise the model again from its 16-bit folder"
        )
    for part in weight.tensors().values():
        if part.is_floating_point():
            refuse_not_finite(name, str(first.file), part)
    return weight


def _place_4bit(model: PreTrainedModel, slot: Slot, weight: Weight4bit, scales: Scales = "absmax") -> None:
    """Put a 4-bit layer where a dense one is; its bias may have come already or may still come."""
    name = slot.names[0].removesuffix(".weight")
    dense = model.get_submodule(name)
    layer = Linear4bit(weight, None, from_conv1d=is_conv1d(dense), scales=scales)
    layer.register_parameter("bias", dense._parameters.get("bias"))
    model.set_submodule(name, layer.train(dense.training))


def _place(model: PreTrainedModel, slot: Slot, tensor: Tensor) -> Tensor:
    """Put a tensor under all its names, in the slot's dtype."""
    held = tensor.to(slot.dtype)
    value = nn.Parameter(held, requires_grad=held.is_floating_point()) if slot.is_parameter else held
    for name in slot.names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)
    return value


def _check_tied(entry: _Entry, held: Tensor, tensor: Tensor) -> None:
    """A tied weight may be stored under several names, if it is the same each time."""
    if not torch.equal(held, tensor.to(held.dtype)):
        raise ModelError(
            "HB309",
            f"{' and '.join(entry.slot.names)} are one weight by config.json, but {entry.only.name} differs",
            where=str(entry.only.file),
            fix='set "tie_word_embeddings": false in config.json if the model was trained so',
        )


def _refuse_other_quantisation(folder: ModelFolder, model: PreTrainedModel, asked: QuantSpec | None) -> None:
    """Refuse a stored quantisation other than the one asked for; how scales were found, no file tells."""
    for name, module in model.named_modules():
        if asked is None or not isinstance(module, Linear4bit):
            continue
        weight = module.quantised_weight
        stored = (weight.format, weight.blocksize, weight.double_quantised)
        if stored != (asked.format, asked.blocksize, asked.double_quant):
            got = f"format {stored[0]}, blocksize {stored[1]}, double_quant {stored[2]}"
            raise ModelError(
                "HB314",
                f"{name} is stored with {got}; asked was format {asked.format}, blocksize {asked.blocksize}, "
                f"double_quant {asked.double_quant}",
                where=str(folder.path),
                fix=f"ask for {got}, or start from the 16-bit folder",
            )


def _refuse_untrained(folder: ModelFolder, untrained: set[str]) -> None:
    if untrained:
        raise ModelError(
            "HB351",
            f"{_named(sorted(untrained))} is in no file: the answers would be those of random numbers",
            where=str(folder.path),
            fix="name the adapter that was trained with it, or a folder that holds it with these labels",
        )


def _refuse_unfilled(folder: ModelFolder, model: PreTrainedModel) -> None:
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        _wrong_tensors(
            folder, model, "HB308", f"{_named(empty)} are in no file and transformers did not compute them"
        )
