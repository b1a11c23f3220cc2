"""What every call of the compiled module needs: the module itself, its codes of dtypes, how many threads.

It owns these three; it must not know any operation.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.kernels.native import module

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def native() -> Any:
    """The compiled module; `backends` has made sure that it is there."""
    found = module()
    assert found is not None, "backends chose cpu without its module"
    return found


def threads() -> int:
    """How many threads an operation may use: as many as torch does."""
    return torch.get_num_threads()
