"""Whether a model's folder is the base that an adapter was trained on: a digest of its weights, kept with it.

It owns the digest, its place in the fingerprint's file, and what is said of another base; it must not know adapters'
tensors, or words.
"""

from __future__ import annotations

import hashlib
import os
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from halfbyte.data.fingerprint import FILE
from halfbyte.errors import ModelError
from halfbyte.model.files import ModelFolder, contained, open_model_folder, read_json
from halfbyte.model.stored import StoredTensor

KEY = "base"
STRETCHES, STRETCH = 16, 16
"""So many stretches of so many numbers are looked at in each tensor; all of it where it holds no more."""


def base_digest(model: PreTrainedModel) -> str | None:
    """Digest of the weights in the folder that a model was loaded from.

    Of each stored tensor its name, shape and 256 of its numbers count, evenly spread and rounded to bfloat16: so many
    reads that a large model takes a fraction of a second, and a copy in float32 and one in bfloat16 are the same
    base. A folder in 4 bits that says what it was made from is that base.

    Args:
        model: A model without or with adapters.

    Returns:
        SHA-256 in hexadecimal; None for a model that was not loaded from a folder of safetensors that is still there.
    """
    path = Path(model.name_or_path or "")
    if not model.name_or_path or not path.is_dir():
        return None
    try:
        folder = open_model_folder(path)
    except ModelError:  # loaded by other means than ours, or gone since
        return None
    return _made_from(folder) or _weights_digest(folder)


def read_base(folder: Path) -> str | None:
    """The digest of the base that is written beside an adapter or a folder in 4 bits; None where there is none.

    Raises:
        ModelError: HB327 if there is one that is no digest, or the file cannot be read; HB305 if it lies outside
            the folder.
    """
    if not (folder / FILE).exists():
        return None
    file = contained(folder, FILE)
    try:
        found = read_json(file).get(KEY)
    except ModelError as error:
        raise ModelError("HB327", error.what, where=str(file), fix=error.fix) from error
    if found is None:
        return None
    if not isinstance(found, str) or len(found) != 64 or set(found) - set("0123456789abcdef"):
        what = f"expected the SHA-256 of a base under {KEY!r}, got {found!r}"
        raise ModelError("HB327", what, where=str(file), fix="get the file again")
    return found


def refuse_other_base(model: PreTrainedModel, adapter: Path, named: str) -> None:
    """Refuse an adapter that was trained on another base of the same shape.

    Args:
        model: The base it is to be put on.
        adapter: Folder of the adapter. One that does not say on which weights it was trained passes, as does any
            where the model's own are not known.
        named: The base that the adapter names as its own.

    Raises:
        ModelError: HB349 for another base; HB327 and HB305 as `read_base`.
    """
    trained = read_base(adapter)
    used = base_digest(model) if trained is not None else None
    if trained is None or used is None or trained == used:
        return
    raise ModelError(
        "HB349",
        f"it was trained on the weights of {named} (digest {trained[:12]}), and those of {model.name_or_path} "
        f"(digest {used[:12]}) are others",
        where=str(adapter),
        fix=f"load it on the model it was trained on, or take {KEY!r} out of its {FILE} if the weights were "
        "changed on purpose",
    )


def _made_from(folder: ModelFolder) -> str | None:
    """What a folder in 4 bits was made from, where it says so; any other folder is its own base."""
    return read_base(folder.path) if folder.config.get("quantization_config") else None


def _weights_digest(folder: ModelFolder) -> str:
    digest = hashlib.sha256()
    by_file: dict[Path, list[StoredTensor]] = {}
    for tensor in folder.tensors.values():
        by_file.setdefault(tensor.file, []).append(tensor)
    parts: dict[str, bytes] = {}
    for file, tensors in by_file.items():
        with file.open("rb", buffering=0) as stream:
            for tensor in tensors:
                _announce(stream, tensor)
            parts |= {tensor.name: _numbers(stream, tensor) for tensor in tensors}
    for name in sorted(parts):
        digest.update(f"{name}\0{folder.tensors[name].shape}\0".encode() + parts[name])
    return digest.hexdigest()


def _places(tensor: StoredTensor) -> tuple[list[int], int]:
    """Where in its file the numbers of a tensor that count begin, and how many bytes from each place on."""
    each = tensor.dtype.itemsize
    count = tensor.nbytes // each
    if count <= STRETCHES * STRETCH:
        return [tensor.start], tensor.nbytes
    first = np.linspace(0, count - STRETCH, STRETCHES).astype(np.int64).tolist()
    return [tensor.start + number * each for number in first], STRETCH * each


def _announce(stream: FileIO, tensor: StoredTensor) -> None:
    """Let the system read what will be asked for, all of it at a time: one after the other takes a disk long."""
    if hasattr(os, "posix_fadvise"):
        places, nbytes = _places(tensor)
        for place in places:
            os.posix_fadvise(stream.fileno(), place, nbytes, os.POSIX_FADV_WILLNEED)


def _numbers(stream: FileIO, tensor: StoredTensor) -> bytes:
    """Numbers of a tensor, evenly spread from its first to its last, as bfloat16."""
    places, nbytes = _places(tensor)
    content = bytearray()
    for place in places:
        stream.seek(place)
        content += stream.read(nbytes)
    if not content:
        return b""
    numbers = torch.frombuffer(content, dtype=tensor.dtype).to(torch.bfloat16)
    return bytes(numbers.view(torch.uint8).numpy())
