"""The rotary position embedding in plain PyTorch.

It owns the meaning of the operation, the rounding included, and is written to be read; it must not be clever.

Source: RoFormer (arXiv 2104.09864), section 3.4, with a head's two halves as the pairs, as Llama has it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Turns the first R numbers of every head; computed wide, rounded once.

    With x1, x2 the halves of those R numbers: `x1 cos1 - x2 sin1` and `x2 cos2 + x1 sin2`. `inverse` is the
    transposed map, `x1 cos1 + x2 sin2` and `x2 cos2 - x1 sin1`: the gradient, and for equal halves the turn back.

    Args:
        x: (B, T, H, D).
        cos: (B or 1, T, R), R even and at most D.
        sin: Like cos.
        inverse: Which of the two.

    Returns:
        (B, T, H, D) in x's dtype, contiguous.
    """
    R = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x[..., :R].to(wide).chunk(2, dim=-1)
    cos1, cos2 = cos[:, :, None].to(wide).chunk(2, dim=-1)
    sin1, sin2 = sin[:, :, None].to(wide).chunk(2, dim=-1)
    if inverse:
        turned = (x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1)
    else:
        turned = (x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2)
    return torch.cat([*(half.to(x.dtype) for half in turned), x[..., R:]], dim=-1)


def rotate_into(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, out: Tensor) -> None:
    """`rotate` written to `out`, which may be x."""
    out.copy_(rotate(x, cos, sin, inverse))
