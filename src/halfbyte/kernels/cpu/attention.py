"""Attention over documents on the CPU through the compiled module.

It owns the passage of tensors to the compiled kernels; it must not check arguments (that is `kernels.attention`) nor
compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.scope import Saved, Scope


def attention(q: Tensor, k: Tensor, v: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    B, T, H, _ = q.shape
    whole = _is_whole(scope, q)
    out = _result(q, whole)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if not whole:
        lse.fill_(-torch.inf)
    native().attention(_what(q, k, scope), *map(_heads, (q, k, v, out)), lse.data_ptr(), threads())
    return out, lse


def attention_grad(dout: Tensor, saved: Saved, scope: Scope) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.attention_grad`."""
    q, k, v, out, lse = saved
    whole = _is_whole(scope, q)
    dq, dk, dv = _result(q, whole), _result(k, whole), _result(v, whole)
    native().attention_grad(
        _what(q, k, scope),
        *map(_heads, (dout, q, k, v, out)),
        lse.data_ptr(),
        *map(_heads, (dq, dk, dv)),
        threads(),
    )
    return dq, dk, dv


def _is_whole(scope: Scope, q: Tensor) -> bool:
    """Whether every token is in a document, so that every number of a result is written."""
    documents = scope.documents
    return int((documents[:, 2] - documents[:, 1]).sum()) == q.shape[0] * q.shape[1]


def _result(like: Tensor, whole: bool) -> Tensor:
    return like.new_empty(like.shape) if whole else like.new_zeros(like.shape)


def _heads(heads: Tensor) -> tuple[int, int, int, int]:
    return heads.data_ptr(), heads.stride(0), heads.stride(1), heads.stride(2)


def _what(q: Tensor, k: Tensor, scope: Scope) -> tuple[int, int, int, int, int, int, int, float, bool, int]:
    _, T, H, D = q.shape
    pointer, count = scope.documents.data_ptr(), scope.documents.shape[0]
    how = (scope.scale, scope.causal, scope.window)
    return DTYPES[q.dtype], T, H, k.shape[2], D, pointer, count, *how
