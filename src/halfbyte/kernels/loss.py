"""The output head and its cross-entropy in one operation, chunk by chunk: the logits of a batch never exist.

It owns what callers may pass and what they get, the chunks, and the two products; it must not know models, nor which
backend turns rows of logits into losses (`backends`).

The gradient is computed together with the loss, while a chunk's logits are there; the backward pass only scales it.
Recomputing the logits later would be a third product with the head, the largest matrix of a model.

Shapes: P trained positions, H hidden size, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.errors import KernelError
from halfbyte.kernels.backends import implementation
from halfbyte.kernels.checks import refused
from halfbyte.kernels.library import define
from halfbyte.kernels.loss_terms import Gradient, LossTerms, place_of_gradient
from halfbyte.kernels.terms import Product, Term

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CHUNK_BYTES = 64 << 20
"""Most logits of a chunk. Every chunk reads the whole head once per product: with 128,256 tokens in float32 these are
130 rows, enough work for each byte of the head that the product does not wait for memory."""

LEAST_ROWS = 16
"""Rows of a chunk however large the vocabulary is: fewer, and the head is read for almost nothing."""

PANEL = 8192
"""Tokens of the vocabulary whose weight gradient is computed at once where it must be widened after."""

_SETTINGS = "Tensor? bias, float label_smoothing, float z_loss, float softcap, float logit_scale"
_LOSS = f"(Tensor hidden, Tensor weight, Tensor targets, {_SETTINGS}, float divisor, bool[] wanted)"


class HeadLoss(NamedTuple):
    """A batch's share of a step's loss.

    Attributes:
        objective: Scalar, what is minimised; its gradient is that of the whole head and loss.
        cross_entropy: Scalar without gradient, plain; equals `objective` without smoothing and z-loss.
    """

    objective: Tensor
    cross_entropy: Tensor


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    divisor: float,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> HeadLoss:
    """Sum over positions of the loss of `softcap · tanh(logit_scale · (hidden · Wᵀ + bias) / softcap)`, divided.

    Args:
        hidden: (P, H) float32, bfloat16 or float16 (float64 through the reference), trained positions only.
        weight: (V, H) in hidden's dtype, or float32: rounded to hidden's dtype before it is multiplied.
        targets: (P,) int64, 0 ≤ target < V.
        divisor: Trained tokens of the whole step, > 0; part of the gradient before that is rounded.
        bias: (V,) floating point, or None.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 ≤ label_smoothing < 1.
        z_loss: Weight of the squared log-sum-exp, ≥ 0.
        softcap: Largest magnitude of a logit, > 0; None for no cap.
        logit_scale: Factor of the products, not 0.

    Returns:
        Objective and plain cross-entropy, float32 (float64 for float64). NaN in a row is NaN in both.

    Raises:
        KernelError: HB402 when shapes, dtypes, devices or numbers do not fit, or a target is no token.
    """
    _check_tensors("head_loss", _Inputs(hidden, weight, targets, bias))
    terms = _terms("head_loss", label_smoothing, z_loss, softcap, logit_scale)
    if not (math.isfinite(divisor) and divisor > 0):
        raise _out_of_range("head_loss", "divisor", divisor, "a finite number above 0")
    tracked = (hidden, weight, bias) if torch.is_grad_enabled() else ()
    wanted = [each is not None and each.requires_grad for each in tracked] or [False] * 3
    found = torch.ops.halfbyte.head_loss(hidden, weight, targets, bias, *terms, divisor, wanted)
    return HeadLoss(found[0], found[1])


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Negative log-likelihood of each target, with the gradient of `hidden`; arguments as for `head_loss`.

    What is made of the losses may be any function of them: each depends on its own row of `hidden` alone, so that
    row's gradient is computed beside it and only scaled in the backward pass.

    Returns:
        (P,) float64, in nats.

    Raises:
        KernelError: HB402, as `head_loss`; for a weight or bias whose gradient would be wanted.
    """
    _check_tensors("token_losses", _Inputs(hidden, weight, targets, bias))
    terms = _terms("token_losses", 0.0, 0.0, softcap, logit_scale)
    tracked = torch.is_grad_enabled()
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tracked and tensor is not None and tensor.requires_grad:
            raise refused("token_losses", name, tensor, "one without gradient")
    wanted = tracked and hidden.requires_grad
    nll: Tensor = torch.ops.halfbyte.token_losses(hidden, weight, targets, bias, *terms[2:], wanted)[0]
    return nll


class _Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None


def _check_tensors(operation: str, inputs: _Inputs) -> None:
    hidden, weight, targets, bias = inputs
    device = hidden.device
    if hidden.dtype not in DTYPES or hidden.dim() != 2 or device.type != "cpu":
        raise refused(operation, "hidden", hidden, "(P, H) float32, bfloat16 or float16 on cpu")
    (P, H), V = hidden.shape, len(weight) if weight.dim() else 0
    fits = weight.dim() == 2 and weight.shape[1] == H and V > 0
    if not fits or weight.dtype not in (hidden.dtype, torch.float32) or weight.device != device:
        raise refused(operation, "weight", weight, f"(V, {H}) {hidden.dtype} or torch.float32 on {device}")
    if targets.shape != (P,) or targets.dtype != torch.int64 or targets.device != device:
        raise refused(operation, "targets", targets, f"({P},) torch.int64 on {device}")
    if bias is not None and (bias.shape != (V,) or not bias.is_floating_point() or bias.device != device):
        raise refused(operation, "bias", bias, f"({V},) floating point on {device}")


def _terms(
    operation: str, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float
) -> LossTerms:
    if not 0 <= label_smoothing < 1:
        raise _out_of_range(operation, "label_smoothing", label_smoothing, "at least 0 and below 1")
    if not 0 <= z_loss < math.inf:
        raise _out_of_range(operation, "z_loss", z_loss, "a finite number of at least 0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise _out_of_range(operation, "softcap", softcap, "a finite number above 0, or None")
    if not 0 < abs(logit_scale) < math.inf:
        raise _out_of_range(operation, "logit_scale", logit_scale, "a finite number other than 0")
    return LossTerms(label_smoothing, z_loss, softcap or 0.0, logit_scale)


def _out_of_range(operation: str, name: str, got: float, expected: str) -> KernelError:
    return KernelError("HB402", f"{operation}: {name} is {got}, expected {expected}", fix=f"correct {name}")


def _check_targets(targets: Tensor, V: int) -> None:
    # Not beside the other checks: while torch traces, the numbers are not known.
    bad = ((targets < 0) | (targets >= V)).nonzero()
    if len(bad):
        i = int(bad[0])
        what = f"targets[{i}] is {int(targets[i])}, expected a token from 0 to {V - 1}"
        fix = "drop the positions that are not trained, and check that tokenizer and model belong together"
        raise KernelError("HB402", what, fix=fix)


def chunk_rows(P: int, V: int, itemsize: int) -> int:
    """Rows of a chunk: as few chunks as `CHUNK_BYTES` allows, of equal size but the last.

    Args:
        P: Rows of all chunks.
        V: Logits of a row.
        itemsize: Bytes of a logit; its gradient takes its place.
    """
    most = max(LEAST_ROWS, CHUNK_BYTES // (V * itemsize))
    return max(1, math.ceil(P / max(1, math.ceil(P / most))))


class _Chunk(NamedTuple):
    rows: slice
    hidden: Tensor  # (R, H)
    nll: Tensor  # (R,) float64
    objective: Tensor  # (R,) float64
    dlogits: Tensor  # (R, V) in hidden's dtype, where a gradient is wanted


def _chunks(inputs: _Inputs, terms: LossTerms, factor: float | None) -> Iterator[_Chunk]:
    """The losses chunk by chunk, with gradients where there is a factor; each chunk overwrites the one before."""
    hidden, weight, targets, bias = inputs
    V = weight.shape[0]
    _check_targets(targets, V)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    rows = chunk_rows(len(hidden), V, wide.itemsize)
    buffer = hidden.new_empty((min(rows, len(hidden)), V), dtype=wide)
    wide_bias = None if bias is None else bias.to(wide).contiguous()
    gradient = None if factor is None else Gradient(hidden.dtype, factor)
    loss_rows = implementation("loss_rows", hidden.dtype)
    for begin in range(0, len(hidden), rows):
        part = slice(begin, begin + rows)
        logits = buffer[: len(hidden[part])]
        _logits(hidden[part], weight, logits)
        nll, objective = loss_rows(logits, targets[part], wide_bias, terms, gradient)
        yield _Chunk(part, hidden[part], nll, objective, place_of_gradient(logits, hidden.dtype))


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (R, V) = hidden (R, H) · Wᵀ, summed in float32 and, for narrower numbers, not rounded."""
    product = Product((Term(hidden, weight),))
    implementation("linear", hidden.dtype)([product], out.dtype, [out])


def _hidden_grad(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (R, H) = dlogits (R, V) · W, summed in float32 and rounded once; rows of dlogits may lie apart."""
    product = Product((Term(dlogits, weight),))
    implementation("linear_grad", out.dtype)([product], out.dtype, [out])


def _weight_grad(dlogits: Tensor, hidden: Tensor, total: Tensor) -> None:
    """total (V, H) += dlogitsᵀ · hidden, in float32 from chunk to chunk."""
    if hidden.dtype == total.dtype:
        total.addmm_(dlogits.T, hidden)
        return
    for begin in range(0, len(total), PANEL):
        total[begin : begin + PANEL] += torch.mm(dlogits[:, begin : begin + PANEL].T, hidden)


def _compute_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    *terms, divisor, wanted = settings
    hidden, targets, narrow = hidden.contiguous(), targets.contiguous(), weight.to(hidden.dtype).contiguous()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = hidden.new_empty(hidden.shape if wanted[0] else 0)
    dweight = hidden.new_zeros(weight.shape if wanted[1] else 0, dtype=wide)
    dbias = hidden.new_zeros(len(weight) if wanted[2] else 0, dtype=wide)
    loss = plain = 0.0
    factor = 1.0 / divisor if any(wanted) else None
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(_Inputs(hidden, narrow, targets, bias), LossTerms(*terms), factor):
            loss += float(chunk.objective.sum())
            plain += float(chunk.nll.sum())
            if wanted[0]:
                _hidden_grad(chunk.dlogits, narrow, dhidden[chunk.rows])
            if wanted[1]:
                _weight_grad(chunk.dlogits, chunk.hidden, dweight)
            if wanted[2]:
                dbias += chunk.dlogits.sum(dim=0, dtype=wide)
    scalars = [hidden.new_tensor(total / divisor, dtype=wide) for total in (loss, plain)]
    return (*scalars, dhidden, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype))


def _loss_shapes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scalars = [hidden.new_empty((), dtype=wide) for _ in range(2)]
    dbias = hidden.new_empty(0, dtype=wide) if bias is None else bias
    like = (hidden, weight, dbias)
    grads = [x.new_empty(x.shape if want else 0) for x, want in zip(like, settings[-1], strict=True)]
    return (*scalars, *grads)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])
    ctx.wanted = inputs[-1]


@once_differentiable
def _scale_gradients(ctx: Any, dobjective: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dhidden, dweight, dbias = (
        saved * dobjective if want else None
        for saved, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return dhidden, dweight, None, dbias, None, None, None, None, None, None


def _compute_token_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    *bend, wanted = settings
    nll = hidden.new_empty(len(hidden), dtype=torch.float64)
    inputs = _Inputs(hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets.contiguous(), bias)
    dhidden = hidden.new_empty(hidden.shape if wanted else 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in _chunks(inputs, LossTerms(0.0, 0.0, *bend), 1.0 if wanted else None):
            nll[chunk.rows] = chunk.nll
            if wanted:
                _hidden_grad(chunk.dlogits, inputs.weight, dhidden[chunk.rows])
    return nll, dhidden


def _token_losses_shapes(hidden: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    nll = hidden.new_empty(hidden.shape[0], dtype=torch.float64)
    return nll, hidden.new_empty(hidden.shape if settings[-1] else 0)


def _save_hidden_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _scale_rows(ctx: Any, dnll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (dhidden,) = ctx.saved_tensors
    wide = torch.promote_types(dhidden.dtype, torch.float32)
    return (dhidden * dnll.to(wide)[:, None]).to(dhidden.dtype), *[None] * 6


define(
    "head_loss",
    f"{_LOSS} -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_loss,
    _loss_shapes,
    (_scale_gradients, _save_gradients),
)
define(
    "token_losses",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float softcap, float logit_scale, bool wanted)"
    " -> (Tensor, Tensor)",
    _compute_token_losses,
    _token_losses_shapes,
    (_scale_rows, _save_hidden_grad),
)
