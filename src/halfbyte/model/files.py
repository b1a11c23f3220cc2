"""What may be read from a model folder: every check made before anything is built from it.

It owns the folder's files and the refusals of unsafe or damaged ones; it must not know modules or
quantisation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.stored import StoredTensor, read_header

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder that passed every check that can be made without reading a tensor.

    Attributes:
        path: The folder.
        config: What its `config.json` says.
        tensors: Tensor name → where it lies, shard by shard in the order of their bytes.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def open_model_folder(path: str | Path) -> ModelFolder:
    """Check a model folder and list its tensors.

    Args:
        path: Folder with `config.json` and safetensors weights, whole or sharded.

    Returns:
        The checked folder; nothing has been built from it.

    Raises:
        ModelError: HB301 folder or JSON unreadable, HB302 remote code, HB303 pickled weights, HB304 damaged
            index, HB305 a file outside the folder, HB306 weights missing, HB307 and HB310 a file that is not
            good safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(
            "HB301", "there is no such folder", where=str(folder), fix="give the path of a model folder"
        )
    if not (folder / CONFIG).is_file():
        is_adapter = (folder / "adapter_config.json").exists()
        raise ModelError(
            "HB301",
            "an adapter, not a model: there is no config.json" if is_adapter else "there is no config.json",
            where=str(folder),
            fix="give the base model's folder, and this one as its adapter"
            if is_adapter
            else "give a folder as transformers' save_pretrained writes it",
        )
    refuse_remote_code(folder)
    return ModelFolder(folder, read_json(contained(folder, CONFIG)), _tensors(folder))


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ModelError: HB301 when it does not.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        reason = f"not readable as JSON: {fault}"
        raise ModelError("HB301", reason, where=str(file), fix="fetch the file again") from fault
    if not isinstance(value, dict):
        got = type(value).__name__
        raise ModelError(
            "HB301", f"holds a {got}, expected an object", where=str(file), fix="fetch the file again"
        )
    return value


def refuse_remote_code(folder: Path) -> None:
    """Refuse a folder in which any configuration names code of its own to be run.

    Raises:
        ModelError: HB302 naming the file and the code.
    """
    for file in sorted(folder.glob("*config.json")):
        for code in _remote_code(read_json(contained(folder, file.name))):
            raise ModelError(
                "HB302",
                f"auto_map asks for {code!r} to be imported and run",
                where=str(file),
                fix="use a model that transformers knows, or remove auto_map if it names one of those",
            )


def _remote_code(config: object) -> Iterator[object]:
    """Every value of a key `auto_map`, at any depth."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            if "auto_map" in value:
                yield value["auto_map"]
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def contained(folder: Path, name: str) -> Path:
    """The file of that name in a folder, after proof that it lies inside.

    A symbolic link may stay inside the folder. The one way out that is accepted is that of the Hugging Face
    cache, whose `snapshots/<revision>/` hold links into the `blobs/` beside them.

    Raises:
        ModelError: HB305 for an absolute name, one with `..`, or a link that leads outside.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    named_outside = posix.is_absolute() or bool(windows.anchor) or ".." in (*posix.parts, *windows.parts)
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if (
        named_outside
        or "\0" in name
        or not any((root / name).resolve().is_relative_to(home) for home in allowed)
    ):
        raise ModelError(
            "HB305",
            f"{name!r} lies outside the folder",
            where=str(folder),
            fix="do not trust this folder unless you know its author; else put the file itself inside",
        )
    return folder / name


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / WEIGHTS).exists() or (folder / WEIGHTS).is_symlink():
        return read_header(_existing(folder, WEIGHTS))
    if (folder / INDEX).exists() or (folder / INDEX).is_symlink():
        return _sharded_tensors(folder)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise ModelError(
            "HB303",
            f"only pickled weights ({', '.join(pickled[:3])}), which can run any code when opened",
            where=str(folder),
            fix=f"use the safetensors version of the model ({WEIGHTS})",
        )
    raise ModelError(
        "HB306", f"neither {WEIGHTS} nor {INDEX}", where=str(folder), fix="fetch the weights again"
    )


def _existing(folder: Path, name: str) -> Path:
    file = contained(folder, name)
    if not file.is_file():
        raise ModelError("HB306", f"{name} is missing", where=str(folder), fix="fetch this file again")
    return file


def _sharded_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors an index names. Tensors of a shard that the index leaves out are left out here too."""
    index = contained(folder, INDEX)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(
            "HB304", "weight_map does not map names to files", where=str(index), fix="fetch the index again"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not shard.endswith(".safetensors"):
            raise ModelError(
                "HB303",
                f"the index names {shard!r}, which is not safetensors",
                where=str(index),
                fix="use the safetensors version of the model",
            )
        held = read_header(_existing(folder, shard))
        wanted = {name for name, home in weight_map.items() if home == shard}
        if absent := sorted(wanted - held.keys()):
            raise ModelError(
                "HB304",
                f"{shard} lacks {len(absent)} tensors the index promises: {', '.join(absent[:5])}",
                where=str(index),
                fix="fetch the index and its shards again, from one revision",
            )
        tensors |= {name: tensor for name, tensor in held.items() if name in wanted}
    return tensors
