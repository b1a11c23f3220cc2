"""A decoder layer, and a group of linear layers, as one node each of torch's autograd graph.

It owns what autograd is told: inputs, what is saved, which gradients go where; it must not know the arithmetic
(`passes`, `projection`) or modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.model.layer import Keep, Layer, Surroundings
from halfbyte.model.offload import Offload
from halfbyte.model.packed import pack, unpack
from halfbyte.model.passes import call, layer_backward, layer_forward
from halfbyte.model.projection import Projection, project, project_grad


def run_layer(
    layer: Layer, x: Tensor, around: Surroundings, keep: Keep, offload: Offload | None = None
) -> Tensor:
    """A layer's output, differentiable in x and in the branches of its projections.

    Args:
        layer: Its parts.
        x: (B, T, C) contiguous.
        around: Documents and positions.
        keep: What is kept for the backward pass, and how.
        offload: Where it waits, if that is on disk.

    Raises:
        TrainError: HB520, HB521 for a disk that is full or fails.
    """
    trained = _trained(layer.projections)
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return layer_forward(call(layer, x, around), Keep.INPUT)[0]
    y: Tensor = _Layer.apply(x, layer, around, (keep, offload), *trained)  # type: ignore[no-untyped-call]
    return y


def run_projection(layer: Projection, x: Tensor) -> Tensor:
    """A linear layer's output (..., N), differentiable in x (..., K) and in its branch."""
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Projection.apply(flat, layer, *_trained([layer]))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


def _trained(projections: Iterable[Projection]) -> list[Tensor]:
    return [tensor for p in projections if p.branch for tensor in (p.branch.A, p.branch.B)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Layer,
        around: Surroundings,
        how: tuple[Keep, Offload | None],
        *trained: Tensor,
    ) -> Tensor:
        this = call(layer, x, around)
        keep, ctx.offload = how
        y, kept = layer_forward(this, keep.kept)
        ctx.call = this._replace(x=x.new_empty(0))  # what is kept has the input
        ctx.keep, kept = keep, {"x": x, **kept}
        if keep.on_disk:
            assert ctx.offload is not None
            ctx.waiting, kept = ctx.offload.put(kept), {}
        elif keep is Keep.EIGHT_BIT:
            kept = pack(kept, len(this.flat))
        ctx.names = list(kept)
        ctx.save_for_backward(*kept.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if ctx.keep.on_disk:
            kept = ctx.offload.take(ctx.waiting)
        elif ctx.keep is Keep.EIGHT_BIT:
            kept = unpack(kept, dy.dtype)
        this = ctx.call._replace(x=kept.pop("x"))
        dx, grads = layer_backward(this, dy, kept, need_dx=ctx.needs_input_grad[0])
        return dx, None, None, None, *(grad for pair in grads for grad in pair)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Projection, *trained: Tensor) -> Tensor:
        ctx.layer = layer
        (y,), reduced, ctx.seeds = project(x, [layer])
        ctx.save_for_backward(x if layer.branch else None, reduced)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced = ctx.saved_tensors
        need_dx = ctx.needs_input_grad[0]
        dx, grads = project_grad([dy.contiguous()], x, reduced, [ctx.layer], ctx.seeds, need_dx=need_dx)
        return dx, None, *(grad for pair in grads for grad in pair)
