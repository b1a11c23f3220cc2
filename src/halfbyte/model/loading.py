"""From a model folder to a transformers model, tensor by tensor, straight to 4 bits where asked.

It owns that every place is filled with what was checked, and that no 16-bit model is ever held; it must not know how
kernels work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from halfbyte.errors import KernelError, ModelError
from halfbyte.kernels import ops
from halfbyte.model.adapters import load_adapter
from halfbyte.model.beside import outside, trained_modules
from halfbyte.model.files import ModelFolder, open_model_folder
from halfbyte.model.linear4bit import Linear4bit, features, is_conv1d
from halfbyte.model.matching import Entry, match, named, refuse_mostly_unquantised, wrong_tensors
from halfbyte.model.purpose import Head, begin, unread_modules
from halfbyte.model.quantised_file import read_digests, refuse_changed_file
from halfbyte.model.residency import MappedWeights, Residency, stream
from halfbyte.model.skeleton import Slot, build_skeleton
from halfbyte.model.stored import StoredTensor
from halfbyte.quant.formats import from_bitsandbytes
from halfbyte.quant.weight import QuantSpec, Scales, Weight4bit

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all."""


def load(
    path: str | Path,
    *,
    quantization: QuantSpec | None,
    dtype: torch.dtype,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
    head: Head | None = None,
    residency: Residency | None = None,
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
        residency: Take the weights from the mapped files as they stand there, frozen, all in memory (`resident`) or
            layer by layer (`streamed`). None reads them into memory of their own, as do weights that are quantised
            or converted on the way.

    Returns:
        The model in evaluation mode. In 4 bits or mapped it is frozen; else its parameters require gradients.

    Raises:
        ModelError: HB301 to HB315 for the folder, HB322 to HB325 for the adapter, HB350 for a model that is no
            encoder, HB351 for a head that neither folder nor adapter holds and that may not begin, HB368 to HB370
            for one that cannot be mapped or streamed, HB358, HB359 and HB365 for a file in 4 bits that is not the one
            its digests were taken of.
    """
    refuse_changed_file(Path(path))
    folder = open_model_folder(path)
    stored_in_4bit = is_in_4bit(folder)
    model = build_skeleton(folder, dtype, head)
    entries, fresh = match(folder, model, head)
    if any(entry.is_4bit for entry in entries) != stored_in_4bit:
        wrong_tensors(
            folder, model, "HB314", "config.json and the weights disagree on whether they are in 4 bits"
        )
    if quantization is not None and not stored_in_4bit:
        refuse_mostly_unquantised(str(folder.path), [entry.slot for entry in entries])
    weights = MappedWeights(residency) if residency is not None else None
    _fill(model, entries, None if stored_in_4bit else quantization, progress, weights)
    if stored_in_4bit:
        refuse_other_quantisation(folder, model, quantization)
    begin(model, fresh, head.seed or 0 if head is not None else 0)
    _refuse_unfilled(folder, model)
    if weights is not None or any(isinstance(module, Linear4bit) for module in model.modules()):
        model.requires_grad_(False)
    if weights is not None and residency == "resident" and (digests := read_digests(folder.path)):
        digests.check_all()
    if weights is not None and residency == "streamed":
        stream(model, weights, read_digests(folder.path))
    load_generation_config(folder, model)
    if adapter is not None:
        load_adapter(model, Path(adapter))
    if head is not None and head.seed is None:
        untrained = outside(fresh, unread_modules(model))
        _refuse_untrained(folder, set(untrained) - trained_modules(model).keys())
    model.train(False)
    return model


def load_generation_config(folder: ModelFolder, model: PreTrainedModel) -> None:
    """Give a model the settings its folder has for generating."""
    file = folder.path / "generation_config.json"
    if not file.is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    except Exception as fault:  # any of transformers' own; it is told, with its cause, not hidden
        raise ModelError("HB301", str(fault), where=str(file), fix="correct or remove the file") from fault


def is_in_4bit(folder: ModelFolder) -> bool:
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


def _fill(
    model: PreTrainedModel,
    entries: list[Entry],
    quantization: QuantSpec | None,
    progress: Progress | None,
    mapped: MappedWeights | None,
) -> None:
    """Read or map every entry into its place; what is only passing through shares one buffer."""

    def passes_through(entry: Entry) -> bool:
        to_4bit = quantization is not None and entry.slot.linear is not None
        return not entry.is_4bit and (to_4bit or entry.only.dtype != entry.slot.dtype)

    largest = max((entry.nbytes for entry in entries if passes_through(entry)), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    total, done = sum(entry.nbytes for entry in entries), 0
    filled: dict[tuple[str, ...], Tensor] = {}
    for entry in entries:
        if entry.is_4bit:
            read_part = StoredTensor.read if mapped is None else partial(mapped.take, entry.slot.names)
            place_4bit(model, entry.slot, read_4bit(entry, read_part))
        else:
            passes = passes_through(entry)
            tensor = (
                entry.only.read(buffer if passes else None)
                if passes or mapped is None
                else mapped.take(entry.slot.names, entry.only)
            )
            _check_values(entry, tensor)
            if quantization is not None and entry.slot.linear is not None:
                place_quantised(model, entry.slot, tensor, quantization)
            elif entry.slot.names in filled:
                check_tied(entry, filled[entry.slot.names], tensor)
            else:
                filled[entry.slot.names] = _place(model, entry.slot, tensor)
        if mapped is not None:
            mapped.let_go()
        done += entry.nbytes
        if progress is not None:
            progress(done, total)


def _check_values(entry: Entry, tensor: Tensor) -> None:
    """Refuse NaN and Inf, and numbers of another kind than the model computes with."""
    refuse_other_kind(entry)
    if tensor.is_floating_point() and tensor.numel():
        refuse_not_finite(entry.only.name, str(entry.only.file), tensor)


def refuse_other_kind(entry: Entry) -> None:
    """Refuse a tensor that is stored in numbers of another kind than the model computes with: HB310."""
    stored = entry.only
    if stored.dtype.is_floating_point != entry.slot.dtype.is_floating_point:
        raise ModelError(
            "HB310",
            f"{stored.name} is stored as {stored.dtype}, the model computes in {entry.slot.dtype}",
            where=str(stored.file),
            fix="use the model's 16-bit folder; this one may be quantised by another tool",
        )


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
    place_4bit(model, slot, quantised(slot, tensor, spec), spec.scales)


def quantised(slot: Slot, tensor: Tensor, spec: QuantSpec) -> Weight4bit:
    """The weight of a linear layer in 4 bits: (N, K), whatever way round it is stored."""
    assert slot.linear is not None
    if is_conv1d(slot.linear):
        tensor = tensor.T.contiguous()  # (K, N) -> (N, K)
    weight = ops.quantize_4bit(tensor.float() if tensor.dtype == torch.float64 else tensor, spec)
    return replace(weight, dtype=slot.dtype)


def read_4bit(entry: Entry, read_part: Callable[[StoredTensor], Tensor] = StoredTensor.read) -> Weight4bit:
    """A weight that is stored in 4 bits, of the shape its layer has.

    Args:
        entry: The weight.
        read_part: Reads one of its tensors; on the meta device it stays without values, which are not looked at.
    """
    name, first = next(iter(entry.stored.items()))
    read = {part: read_part(tensor) for part, tensor in entry.stored.items()}
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
        if part.is_floating_point() and not part.is_meta:
            refuse_not_finite(name, str(first.file), part)
    return weight


def place_4bit(model: PreTrainedModel, slot: Slot, weight: Weight4bit, scales: Scales = "absmax") -> None:
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


def check_tied(entry: Entry, held: Tensor, tensor: Tensor) -> None:
    """A tied weight may be stored under several names, if it is the same each time."""
    if not torch.equal(held, tensor.to(held.dtype)):
        raise ModelError(
            "HB309",
            f"{' and '.join(entry.slot.names)} are one weight by config.json, but {entry.only.name} differs",
            where=str(entry.only.file),
            fix='set "tie_word_embeddings": false in config.json if the model was trained so',
        )


def refuse_other_quantisation(folder: ModelFolder, model: PreTrainedModel, asked: QuantSpec | None) -> None:
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
            f"{named(sorted(untrained))} is in no file: the answers would be those of random numbers",
            where=str(folder.path),
            fix="name the adapter that was trained with it, or a folder that holds it with these labels",
        )


def _refuse_unfilled(folder: ModelFolder, model: PreTrainedModel) -> None:
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        wrong_tensors(
            folder, model, "HB308", f"{named(empty)} are in no file and transformers did not compute them"
        )
