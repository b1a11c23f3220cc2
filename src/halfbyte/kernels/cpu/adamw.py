"""A step of AdamW with 8-bit states on the CPU through the compiled module.

It owns the passage of its tensors to the compiled kernel; it must not check arguments nor compute.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.cpu.calls import native, threads
from halfbyte.quant.codebook import dynamic_bounds, dynamic_map


def adamw_8bit_(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    factors: list[float],
) -> None:
    """See `reference.adamw_8bit_`."""
    native().adamw_8bit(
        p.data_ptr(),
        g.data_ptr(),
        p.numel(),
        (m.data_ptr(), m_scale.data_ptr(), *_tables(signed=True)),
        (v.data_ptr(), v_scale.data_ptr(), *_tables(signed=False)),
        tuple(factors),
        threads(),
    )


def _tables(*, signed: bool) -> tuple[int, int]:
    """Addresses of a map's values and bounds, which stay where they are."""
    return dynamic_map(signed=signed).ctypes.data, dynamic_bounds(signed=signed).ctypes.data
