"""The rotary position embedding on the CPU through the compiled module.

It owns the passage of its tensors to the compiled kernel; it must not check arguments nor compute.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.cpu.rows import Rows, fresh


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """See `reference.rotate`."""
    out = fresh(x)
    rotate_into(x, cos, sin, inverse, out)
    return out


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """See `reference.rotate_into`."""
    x, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, cos, sin))
    B, T, H, D = x.shape
    native().rotate(
        (B, T, H, D),
        _heads(x),
        _heads(out),
        _table(cos),
        _table(sin),
        cos.shape[-1],
        inverse,
        threads(),
    )


def _heads(x: Tensor) -> Rows:
    b, t, h, _ = x.stride()
    return x.data_ptr(), DTYPES[x.dtype], b, t, h


def _table(table: Tensor) -> Rows:
    b, t, _ = table.stride()
    return table.data_ptr(), DTYPES[table.dtype], b if table.shape[0] > 1 else 0, t, 0
