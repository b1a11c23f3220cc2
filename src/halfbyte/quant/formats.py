"""Quantised weights as entries of a bitsandbytes-4bit safetensors file, and back.

It owns the names and the JSON inside that file format; it must not know folders, modules or kernels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.quant.codebook import FORMATS
from halfbyte.quant.weight import NESTED_BLOCKSIZE, Weight4bit

STATE_PREFIX = "quant_state.bitsandbytes__"
STATE_ALIGNMENT = 64
_LONGEST_FLOAT = 24  # as JSON: sign, 17 digits, point, exponent of three digits with its sign
REWRITE = "write the file again with the tool that made it"


def quantised_names(names: Mapping[str, object] | list[str]) -> dict[str, str]:
    """Which names of a file are quantised weights.

    Args:
        names: All tensor names of the file, or of all its shards.

    Returns:
        Weight name → name of its `quant_state` entry.
    """
    found = {}
    for name in names:
        weight, separator, _ = name.partition("." + STATE_PREFIX)
        if separator:
            found[weight] = name
    return found


def entry_names(weight: str, names: Mapping[str, object] | list[str]) -> list[str]:
    """The names of all entries that belong to one quantised weight, itself first."""
    suffixes = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    own = [weight, *(f"{weight}.{suffix}" for suffix in suffixes), f"{weight}.{STATE_PREFIX}nf4"]
    own.append(f"{weight}.{STATE_PREFIX}fp4")
    return [name for name in own if name in names]


def to_bitsandbytes(name: str, weight: Weight4bit) -> dict[str, Tensor]:
    """The entries of a quantised weight in a bitsandbytes-4bit safetensors file.

    Args:
        name: The parameter's name, such as `model.layers.0.mlp.up_proj.weight`.
        weight: The quantised weight.

    Returns:
        Entry name → tensor: codes as (bytes, 1), scales, codebooks, and the state as JSON in uint8, whose
            length is the same for all weights of a shape.
    """
    state: dict[str, Any] = {
        "quant_type": weight.format,
        "blocksize": weight.blocksize,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {
        name: weight.codes.reshape(-1, 1),
        f"{name}.absmax": weight.scales,
        f"{name}.quant_map": weight.codebook,
    }
    if weight.nested_scales is not None and weight.nested_codebook is not None and weight.offset is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
        entries[f"{name}.nested_absmax"] = weight.nested_scales
        entries[f"{name}.nested_quant_map"] = weight.nested_codebook
    packed = torch.frombuffer(bytearray(_pack(state)), dtype=torch.uint8)
    entries[f"{name}.{STATE_PREFIX}{weight.format}"] = packed
    return entries


def _pack(state: dict[str, Any]) -> bytes:
    """The state as JSON, followed by blanks, so that its length depends on no number but the shape."""
    length = len(json.dumps(state | {"nested_offset": ""})) + _LONGEST_FLOAT
    return json.dumps(state).ljust(-(-length // STATE_ALIGNMENT) * STATE_ALIGNMENT).encode()


def from_bitsandbytes(name: str, entries: Mapping[str, Tensor]) -> Weight4bit:
    """Read a quantised weight from the entries of a bitsandbytes-4bit safetensors file.

    Args:
        name: The parameter's name.
        entries: At least the entries named by `entry_names`.

    Returns:
        The weight; its tensors are the entries' own, reshaped.

    Raises:
        KernelError: HB405 when an entry is missing or they do not fit together.
    """
    states = [fmt for fmt in FORMATS if f"{name}.{STATE_PREFIX}{fmt}" in entries]
    if len(states) != 1:
        raise KernelError(
            "HB405", f"{len(states)} quantisation states, expected one", where=name, fix=REWRITE
        )
    try:
        state = json.loads(bytes(entries[f"{name}.{STATE_PREFIX}{states[0]}"].numpy()))
        nested = "nested_blocksize" in state
        if nested and state["nested_blocksize"] != NESTED_BLOCKSIZE:
            raise ValueError(f"nested blocks of {state['nested_blocksize']}, expected {NESTED_BLOCKSIZE}")
        shape = tuple(int(size) for size in state["shape"])
        if len(shape) != 2:
            raise ValueError(f"shape {list(shape)}, expected two dimensions")
        return Weight4bit(
            codes=entries[name].reshape(-1),
            scales=entries[f"{name}.absmax"].reshape(-1),
            codebook=entries[f"{name}.quant_map"],
            shape=shape,
            dtype=_dtype(state["dtype"]),
            format=states[0],
            blocksize=int(state["blocksize"]),
            nested_scales=entries[f"{name}.nested_absmax"] if nested else None,
            nested_codebook=entries[f"{name}.nested_quant_map"] if nested else None,
            offset=torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None,
        )
    except (KeyError, TypeError, ValueError) as fault:
        reason = f"entry {fault} is missing" if isinstance(fault, KeyError) else str(fault)
        raise KernelError("HB405", reason, where=name, fix=REWRITE) from fault


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {name!r}, expected float32, bfloat16 or float16")
    assert isinstance(dtype, torch.dtype)
    return dtype
