"""Folders that are written whole or not at all, and the 4-bit model folder that bitsandbytes reads.

It owns how models get to disk, and what of them lies where; it must not know how they are loaded or trained.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.data.fingerprint import FILE as FINGERPRINT
from halfbyte.errors import ModelError
from halfbyte.model.files import CONFIG, WEIGHTS, contained, read_json
from halfbyte.model.linear4bit import Linear4bit, is_linear
from halfbyte.model.lora import adapted_modules
from halfbyte.model.quantised_file import EMBED, HEAD, REST, Digests, lay_out
from halfbyte.model.quantised_writer import FileWriter
from halfbyte.model.same_base import KEY as BASE
from halfbyte.model.same_base import base_digest
from halfbyte.quant.formats import to_bitsandbytes

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_REMAINS = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<end>new|old)")


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Give an empty folder to write into, which becomes `target` if the block ends well and is gone if not.

    A folder that is there already is replaced if every file in it is being written anew; others are never
    lost.

    Args:
        target: The folder to be.

    Yields:
        The folder to write into, beside `target`.

    Raises:
        ModelError: HB316 when `target` is not such a folder, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    work = target.parent / f".{target.name}.{secrets.token_hex(4)}.new"
    try:
        work.mkdir(parents=True)
        yield work
        put_in_place(work, target)
    except (OSError, SafetensorError) as fault:
        raise ModelError(
            "HB316",
            str(fault),
            where=str(target),
            fix="choose a folder that can be written, on a disk with space",
        ) from fault
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, target: Path) -> None:
    """Make a finished folder the target, with all its bytes on the disk before.

    Args:
        work: The folder, beside the target.
        target: Absent, or a folder of which every file is written anew.

    Raises:
        ModelError: HB316 when `target` is not such a folder.
        OSError: The disk refuses; the target is as it was.
    """
    refuse_foreign_files(target, {file.name for file in work.iterdir()})
    aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.old"
    try:
        for file in work.iterdir():
            file.chmod(work.stat().st_mode & 0o666)  # safetensors would keep its files from everybody else
            _to_disk(file)
        if target.exists():
            target.rename(aside)
        try:
            work.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        _to_disk(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_remains(parent: Path, name: str | None = None) -> None:
    """Remove what a process killed within `whole_folder` left, and put back a folder it was just replacing.

    Args:
        parent: Folder in which such folders were written; may be absent.
        name: Of the one folder that is meant; None for all.
    """
    for remains in parent.iterdir() if parent.is_dir() else ():
        if (match := _REMAINS.fullmatch(remains.name)) and name in (None, match["name"]):
            target = parent / match["name"]
            if match["end"] == "old" and not target.exists():
                remains.rename(target)
            else:
                shutil.rmtree(remains)


def refuse_foreign_files(target: Path, written: set[str]) -> None:
    """Refuse a target that holds anything but the files that are written.

    Raises:
        ModelError: HB316.
    """
    if not target.exists():
        return
    foreign = (
        sorted(file.name for file in target.iterdir() if file.name not in written) if target.is_dir() else []
    )
    if foreign or not target.is_dir() or target.is_symlink():
        what = f"it holds {', '.join(foreign[:5])}" if foreign else "it is not a folder of its own"
        raise ModelError(
            "HB316",
            f"{what}, which would be lost",
            where=str(target),
            fix="choose a new folder, or empty this one",
        )


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, as transformers lays them out."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_quantized(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model in 4 bits as a folder that transformers with bitsandbytes loads, and `load` too.

    Tokenizer files of the folder the model came from are copied, and what its `halfbyte.json` says of its words; with
    it stands the digest of that folder's weights, so that adapters fit the one as well as the other.

    Args:
        model: A model whose linear layers are in 4 bits, without adapters.
        folder: Where to; written whole or not at all.

    Raises:
        ModelError: HB322 when the model has adapters, HB315 when it is not in 4 bits, HB316 when the folder
            cannot be written.
    """
    if adapted_modules(model):
        raise ModelError(
            "HB322",
            "this folder holds a base model alone, the model has an adapter",
            where=type(model).__name__,
            fix="save the adapter with save_adapter, and the base from a model loaded without it",
        )
    stored_quantisation(model)
    tensors = entries(model)
    layout = lay_out(tensors, units_of(model, tensors))
    with whole_folder(folder) as work:
        with FileWriter(work / WEIGHTS, layout) as writer:
            for name in layout.tensors:
                writer.put(name, tensors[name])
            digests = writer.finish()
        write_settings(model, work)
        write_origin(model, work, base_digest(model), digests)


def write_settings(model: PreTrainedModel, work: Path) -> None:
    """Write what a folder in 4 bits says of the model: settings, and the tokenizer of the folder it came from.

    Args:
        model: The model, with or without values.
        work: The folder.
    """
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = stored_quantisation(model)
    write_json(work / CONFIG, config)
    if model.generation_config is not None:
        write_json(work / GENERATION, json.loads(model.generation_config.to_json_string()))
    _copy_tokenizer(Path(model.name_or_path or ""), work)


def write_origin(model: PreTrainedModel, work: Path, base: str | None, digests: Digests) -> None:
    """Write of which weights a folder in 4 bits was made, with which words, and what its own weights are.

    Args:
        model: The model, with or without values.
        work: The folder.
        base: Digest of the weights it was made of, where they are known.
        digests: Of its own weights.
    """
    source = Path(model.name_or_path or "")
    known = read_json(contained(source, FINGERPRINT)) if (source / FINGERPRINT).is_file() else {}
    write_json(work / FINGERPRINT, known | ({} if base is None else {BASE: base}) | digests.as_dict())


def stored_quantisation(model: PreTrainedModel) -> dict[str, Any]:
    """The settings by which transformers rebuilds the layers; those not in 4 bits are named.

    Raises:
        ModelError: HB315 without a layer in 4 bits, or with several kinds of them.
    """
    weights = [module.quantised_weight for module in model.modules() if isinstance(module, Linear4bit)]
    kinds = {(weight.format, weight.double_quantised) for weight in weights}
    if len(kinds) != 1:
        raise ModelError(
            "HB315",
            "the model has no 4-bit layer" if not kinds else f"its layers differ in format: {sorted(kinds)}",
            where=type(model).__name__,
            fix="load it with quantization",
        )
    ((fmt, double_quant),) = kinds
    dense = [name for name, m in model.named_modules() if is_linear(m) and not isinstance(m, Linear4bit)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": fmt,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def entries(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything a file in bitsandbytes' form holds, each tensor once: tied weights under their first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        in_4bit = isinstance(module, Linear4bit)
        if isinstance(module, Linear4bit):
            parts = to_bitsandbytes(f"{prefix}.weight", module.quantised_weight)
            # Layers may share a codebook in memory; the file format does not share.
            found |= {
                name: part.clone() if name.endswith("quant_map") else part for name, part in parts.items()
            }
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            if not (in_4bit and name in module._buffers):
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach().contiguous()
    return found


def units_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """In which unit of the file each entry lies: all that is small in the `rest`, a layer's matrices in the layer's.

    Args:
        model: The model, with or without values.
        names: Of its `entries`, in their order.
    """
    modules = dict(model.named_modules())
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {}
    for name in names:
        owner, _, attribute = name.removesuffix(".absmax").rpartition(".")  # scales lie with their codes
        module = modules.get(owner)
        tensor = getattr(module, attribute, None)
        is_matrix = isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.numel() > 0
        if isinstance(module, nn.Embedding):
            found[name] = EMBED
        elif module is head and is_matrix:
            found[name] = HEAD
        elif is_matrix:
            found[name] = _layer_of(name, modules)
        else:
            found[name] = REST
    return found


def _layer_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The layer a name lies in, or the `rest`: the first item of a list of modules on the way to it."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        if isinstance(modules.get(".".join(parts[:depth])), nn.ModuleList):
            return ".".join(parts[: depth + 1])
    return REST


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES if source.is_dir() else ():
        if (source / name).is_file():
            shutil.copyfile(contained(source, name), target / name)
