"""What operations on plain tensors refuse, in one wording.

It owns the dtypes that operations compute in and the error for a tensor that does not fit; it must not know any
operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.errors import KernelError

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def refused(operation: str, name: str, got: Tensor, expected: str) -> KernelError:
    """The error for an argument that does not fit.

    Args:
        operation: Who refuses.
        name: The argument.
        got: The tensor that was passed.
        expected: What would have been right.
    """
    what = f"{operation}: {name} is {got.dtype} {tuple(got.shape)} on {got.device}, expected {expected}"
    return KernelError("HB402", what, fix=f"convert {name}, or pass the tensor that belongs with the others")


def require_rows(operation: str, name: str, x: Tensor) -> None:
    """Refuses what is not rows of floating-point numbers.

    Raises:
        KernelError: HB402 for another dtype, or a tensor without a last dimension.
    """
    if x.dtype not in FLOATS or x.dim() == 0:
        raise refused(operation, name, x, "(..., D) float32, bfloat16 or float16")


def require_like(
    operation: str, name: str, got: Tensor, x: Tensor, shape: Sequence[int] | None = None
) -> None:
    """Refuses a tensor that does not have x's dtype and device, and its shape or the one given.

    Raises:
        KernelError: HB402.
    """
    expected = x.shape if shape is None else shape
    if got.shape != torch.Size(expected) or got.dtype != x.dtype or got.device != x.device:
        raise refused(operation, name, got, f"{tuple(expected)} {x.dtype} on {x.device}")


def require_shape(operation: str, name: str, got: Tensor, x: Tensor, shape: Sequence[int]) -> None:
    """Refuses a tensor of another shape or device; any floating-point dtype that goes with x's is taken.

    Raises:
        KernelError: HB402; float64 goes with float64 alone.
    """
    fits = got.dtype in FLOATS and (got.dtype is torch.float64) == (x.dtype is torch.float64)
    if not fits or got.shape != torch.Size(shape) or got.device != x.device:
        wide = "float64" if x.dtype is torch.float64 else "float32, bfloat16 or float16"
        raise refused(operation, name, got, f"{tuple(shape)} {wide} on {x.device}")
