"""A base of any shape in 4 bits with random weights, made without ever being a model in 16 bits.

It owns the values; it must not know how a file in 4 bits is laid out or written.

Codes are uniform, so that they fill the disk as real ones do; the scales lie around that of weights which neither
shrink nor blow up what passes through them.
"""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from halfbyte.model.files import WEIGHTS, ModelFolder
from halfbyte.model.linear4bit import Linear4bit, features
from halfbyte.model.quantised_file import lay_out
from halfbyte.model.quantised_writer import FileWriter
from halfbyte.model.saving import entries, units_of, write_origin, write_settings
from halfbyte.model.skeleton import build_skeleton, slots
from halfbyte.quant.codebook import codebook, dynamic_map
from halfbyte.quant.weight import QuantSpec, Weight4bit

ROOM = 1.02
"""Times the file's bytes that must be free on the disk."""


def make_base(folder: Path, config: dict[str, Any], tokenizer: Path, seed: int) -> Path:
    """Write a folder that `load` and transformers with bitsandbytes take.

    Args:
        folder: Is created.
        config: Settings of a Llama model.
        tokenizer: Folder whose tokenizer is put beside the weights.
        seed: Decides every value.

    Raises:
        SystemExit: Where the disk has no room for it.
    """
    settings = AutoConfig.for_model("llama", **config)
    settings.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    model = build_skeleton(ModelFolder(folder, settings.to_dict(), {}), torch.bfloat16)
    for slot in slots(model):
        if slot.linear is not None:
            N, K = features(slot.linear)
            weight = Weight4bit.blank((N, K), torch.bfloat16, QuantSpec())
            weight = replace(weight, offset=torch.tensor(1 / math.sqrt(K)))
            model.set_submodule(slot.names[0].removesuffix(".weight"), Linear4bit(weight))
    tensors = entries(model)
    layout = lay_out(tensors, units_of(model, tensors))
    free = shutil.disk_usage(folder).free
    if free < ROOM * layout.file_bytes:
        sys.exit(f"{folder} needs {ROOM * layout.file_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    random = np.random.Generator(np.random.SFC64(seed))
    with FileWriter(folder / WEIGHTS, layout) as writer:
        for name in layout.tensors:
            writer.put(name, _values(name, tensors[name], random))
        digests = writer.finish()
    write_settings(model, folder)
    write_origin(model, folder, None, digests)
    for file in tokenizer.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    return folder


def stored_bytes(folder: Path) -> int:
    """Bytes of its weights' file."""
    return (folder / WEIGHTS).stat().st_size


def _values(name: str, tensor: Tensor, random: np.random.Generator) -> Tensor:
    if not tensor.is_meta:
        return tensor
    if name.endswith("nested_quant_map"):
        return torch.from_numpy(dynamic_map().copy())
    if name.endswith("quant_map"):
        return torch.from_numpy(codebook("nf4").copy())
    if name.endswith("nested_absmax"):
        return torch.full(tensor.shape, 1e-3)
    if tensor.dtype == torch.uint8:
        raw = random.integers(0, 2**64, -(-tensor.numel() // 8), dtype=np.uint64)
        return torch.from_numpy(raw).view(torch.uint8)[: tensor.numel()].view(tensor.shape)
    if tensor.dim() == 1:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    normal = torch.from_numpy(random.standard_normal(tensor.shape, dtype=np.float32))
    return normal.mul_(0.02).to(tensor.dtype)
