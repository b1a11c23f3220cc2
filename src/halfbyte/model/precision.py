"""The dtype a model computes in: by name, as the CPU likes it, or as it is stored.

It owns what `auto` means; it must not know what is computed, or settings files.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import torch

from halfbyte.kernels.native import module
from halfbyte.model.files import ModelFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computing_dtype(name: str = "auto") -> torch.dtype:
    """The dtype a name means; `auto` is bfloat16 where the kernels in use multiply it natively, else float32.

    Args:
        name: `auto` or a key of `DTYPES`.
    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return DTYPES[name]


def multiplies_bfloat16() -> bool:
    """Whether the kernels in use have products of bfloat16; the others would widen it to float32."""
    native = module()
    return native is not None and native.active().endswith("bf16")


def stored_dtype(folder: ModelFolder) -> torch.dtype:
    """The floating-point dtype that most of a folder's numbers are stored in.

    Args:
        folder: An opened model folder.
    """
    numbers: Counter[torch.dtype] = Counter()
    for tensor in folder.tensors.values():
        if tensor.dtype in DTYPES.values():
            numbers[tensor.dtype] += prod(tensor.shape)
    return numbers.most_common(1)[0][0] if numbers else torch.float32
