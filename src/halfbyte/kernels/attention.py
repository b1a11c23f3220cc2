"""Attention over documents: its contract, argument checks, shapes and gradients.

It owns what callers may pass and what they get, registered with torch as `halfbyte::attention`; it must not know
which backend computes nor how (`reference.attention` is the specification).

Shapes: B batch rows, T tokens, H query heads, Hkv key and value heads (H a multiple of it), D head size, n
documents.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.kernels.backends import implementation
from halfbyte.kernels.checks import refused
from halfbyte.kernels.library import define
from halfbyte.kernels.scope import Saved, Scope

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_HOW = "Tensor documents, float scale, bool causal, int window"
_SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {_HOW}) -> (Tensor, Tensor)",
    "attention_grad": (
        f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_HOW}) -> (Tensor, Tensor, Tensor)"
    ),
}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """`softmax(scale · q kᵀ) v`, each token looking only at its own document; differentiable in q, k and v.

    What is saved for the backward pass is q, k, v, the result and one number per token and head.

    Args:
        q: (B, T, H, D) float32, bfloat16 or float16 (float64 through the reference), on the CPU, any strides as long
            as a head's numbers stand next to each other.
        k: (B, T, Hkv, D) in q's dtype, likewise; query head h reads key head h // (H / Hkv).
        v: (B, T, Hkv, D), likewise.
        documents: (n, 3) int32, rows [batch row, first token, token after the last] that do not overlap. Tokens in
            none of them are padding: their result is zero, and so is their gradient.
        scale: What scores are multiplied by, above 0.
        causal: No token sees a later one.
        window: With `causal`: token i sees token j only if i - window < j.

    Returns:
        (B, T, H, D) in q's dtype, contiguous; scores, softmax and sums are float32.

    Raises:
        KernelError: HB402 when shapes, dtypes or strides do not fit, or documents overlap or leave the batch.

    Source: FlashAttention-2 (arXiv 2307.08691).
    """
    return attention_forward(q, k, v, documents, scale=scale, causal=causal, window=window)[0]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, with what `attention_backward` needs, for callers that manage what is saved.

    Returns:
        The result (B, T, H, D), and (B, H, T) float32: the logarithm of the sum of exponentials of the scores of
        each token, -infinity for padding.
    """
    _check_inputs(q, k, v)
    _check_how(q, documents, scale, causal, window)
    out, lse = torch.ops.halfbyte.attention(q, k, v, documents, scale, causal, window or 0)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; the other arguments are those of `attention_forward` and what it returned.

    Args:
        dout: (B, T, H, D) in q's dtype, the gradient of the result.
        q: As given to `attention_forward`.
        k: Likewise.
        v: Likewise.
        out: As returned by it.
        lse: Likewise.
        documents: As given to it.
        scale: Likewise.
        causal: Likewise.
        window: Likewise.

    Returns:
        Contiguous tensors of the shapes and the dtype of q, k and v, summed in float32 in an order that does not
        depend on the number of threads.

    Raises:
        KernelError: HB402 as `attention_forward`.
    """
    _check_inputs(q, k, v)
    _check_how(q, documents, scale, causal, window)
    for name, tensor in {"dout": dout, "out": out}.items():
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise refused("attention", name, tensor, f"{tuple(q.shape)} {q.dtype} as q")
    B, T, H, _ = q.shape
    if lse.shape != (B, H, T) or lse.dtype != _statistics_dtype(q):
        raise refused("attention", "lse", lse, f"({B}, {H}, {T}) {_statistics_dtype(q)}")
    dq, dk, dv = torch.ops.halfbyte.attention_grad(
        dout, q, k, v, out, lse, documents, scale, causal, window or 0
    )
    return dq, dk, dv


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.dtype not in DTYPES or q.numel() == 0:
        raise refused("attention", "q", q, "a non-empty (B, T, H, D) float32, bfloat16 or float16")
    B, T, H, D = q.shape
    if k.dim() != 4 or k.shape[2] == 0 or H % k.shape[2] != 0 or k.shape != (B, T, k.shape[2], D):
        raise refused("attention", "k", k, f"({B}, {T}, Hkv, {D}) with Hkv a divisor of {H}")
    if v.shape != k.shape:
        raise refused("attention", "v", v, f"{tuple(k.shape)} as k")
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.dtype != q.dtype:
            raise refused("attention", name, tensor, f"{q.dtype} as q")
        if tensor.device.type != "cpu":
            raise refused("attention", name, tensor, "a tensor on the CPU")
        if D > 1 and tensor.stride(3) != 1:
            raise refused(
                "attention",
                name,
                tensor,
                f"a head's numbers next to each other, not {tensor.stride(3)} apart",
            )


def _check_how(q: Tensor, documents: Tensor, scale: float, causal: bool, window: int | None) -> None:
    if documents.dim() != 2 or documents.shape[1] != 3 or documents.dtype != torch.int32:
        raise refused("attention", "documents", documents, "(n, 3) int32")
    if documents.device != q.device:
        raise refused("attention", "documents", documents, f"a tensor on {q.device}, where q is")
    if not (math.isfinite(scale) and scale > 0):
        raise KernelError("HB402", f"attention: scale is {scale}, expected above 0", fix="pass D ** -0.5")
    if window is not None and (window < 1 or not causal):
        what = f"attention: window is {window} with causal {causal}, expected at least 1 and causal"
        raise KernelError("HB402", what, fix="pass window=None to see a whole document")


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _attention(q: Tensor, k: Tensor, v: Tensor, *scope: Any) -> tuple[Tensor, Tensor]:
    asked = _scope(scope, q)
    out, lse = implementation("attention", q.dtype)(q, k, v, asked)
    return out, lse


def _attention_grad(dout: Tensor, *saved_and_scope: Any) -> tuple[Tensor, Tensor, Tensor]:
    saved = Saved(*saved_and_scope[:5])
    asked = _scope(saved_and_scope[5:], saved.q)
    dout, out = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, saved.out))
    saved = saved._replace(out=out, lse=saved.lse.contiguous())
    dq, dk, dv = implementation("attention_grad", dout.dtype)(dout, saved, asked)
    return dq, dk, dv


def _scope(arguments: tuple[Any, ...], q: Tensor) -> Scope:
    """The arguments after the tensors, checked; here and not earlier, because only here they surely have values."""
    scope = Scope(*arguments)
    scope.check_documents(q.shape[0], q.shape[1])
    return scope._replace(documents=scope.documents.contiguous())


def _output_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=_statistics_dtype(q))


def _grad_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, *ctx.how = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*Saved(q, k, v, out, lse), documents)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv = torch.ops.halfbyte.attention_grad(dout, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The gradient of the gradient is refused, not computed."""


def _refuse_second_derivative(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
    what = "attention has no second derivative"
    raise KernelError("HB402", what, fix="call backward() without create_graph")


define("attention", _SCHEMAS["attention"], _attention, _output_shapes, (_backward, _save_for_backward))
define(
    "attention_grad",
    _SCHEMAS["attention_grad"],
    _attention_grad,
    _grad_shapes,
    (_refuse_second_derivative, _save_nothing),
)
