"""Attention over documents in plain PyTorch, with the whole matrix of who sees whom.

It owns what the operation means, forward and backward; it must not check arguments nor be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.scope import Saved, Scope


def attention(q: Tensor, k: Tensor, v: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """Scores, softmax over what is seen, and the weighted sum of the values, in float32 (float64 for float64).

    Returns:
        (B, T, H, D) in q's dtype and the logarithms of the sums of exponentials, (B, H, T); 0 and -infinity for
        tokens in no document.
    """
    seen = scope.visible(q.shape[0], q.shape[1])[:, None]  # (B, 1, T, T)
    _, scores = _scores(q, k, scope.scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)  # (B, H, T)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0.0)  # where nothing is seen: -inf - -inf
    out = torch.einsum("bhij,bjhd->bihd", weights, _repeated(v, q))
    return out.to(q.dtype), lse


def attention_grad(dout: Tensor, saved: Saved, scope: Scope) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by formula: with weights P and dP = dout vᵀ, dS = P ∘ (dP - rowsum(dout ∘ out)).

    Returns:
        dq = scale · dS k, dk = scale · dSᵀ q, dv = Pᵀ dout, in the inputs' dtype; key and value heads get the sum
        over their query heads.

    Source: FlashAttention-2 (arXiv 2307.08691), section 2.2.
    """
    q, k, v, out, lse = saved
    seen = scope.visible(q.shape[0], q.shape[1])[:, None]
    wide, scores = _scores(q, k, scope.scale)
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0.0)  # (B, H, T, T)
    dout, out = dout.to(wide.dtype), out.to(wide.dtype)
    delta = (dout * out).sum(-1).transpose(1, 2)  # (B, H, T)
    dweights = torch.einsum("bihd,bjhd->bhij", dout, _repeated(v, q))
    dscores = weights * (dweights - delta[..., None]) * scope.scale
    dq = torch.einsum("bhij,bjhd->bihd", dscores, _repeated(k, q))
    dk = torch.einsum("bhij,bihd->bjhd", dscores, wide)
    dv = torch.einsum("bhij,bihd->bjhd", weights, dout)
    return dq.to(q.dtype), _summed(dk, k), _summed(dv, v)


def _scores(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The queries in the dtype that is computed in, and (B, H, T, T) scores."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    return wide, torch.einsum("bihd,bjhd->bhij", wide, _repeated(k, q)) * scale


def _repeated(heads: Tensor, q: Tensor) -> Tensor:
    """Each key or value head once for every query head that reads it, in the dtype that is computed in."""
    wide = heads.to(torch.promote_types(q.dtype, torch.float32))
    return wide.repeat_interleave(q.shape[2] // heads.shape[2], dim=2)


def _summed(grad: Tensor, heads: Tensor) -> Tensor:
    """Sums the gradients of a repeated head."""
    B, T, Hkv, D = heads.shape
    return grad.reshape(B, T, Hkv, -1, D).sum(3).to(heads.dtype)
