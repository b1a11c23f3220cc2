"""The memory that the compiled kernels take beside their results, from the arguments of each operation.

It owns these sizes, which follow native/ and the chunks of the loss; it must not know models or who adds them up.

Shapes: M rows of activations, N out features, K in features, P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.loss import PANEL, chunk_rows
from halfbyte.model.precision import multiplies_bfloat16

_PANEL = 64  # native/kernels.hpp: kPanel
_DEPTH = 128  # native/lanes.hpp: kDepth
_TOKENS = 512  # native/forward.cpp: kTokens
_FEW_ROWS = 8  # native/kernels.hpp: kFewRows
_ROWS_AT_ONCE = 64  # native/forward.cpp: kRowsAtOnce
_BACKWARD_ROWS, _BACKWARD_PANELS = 512, 2  # native/backward.cpp: kRows, kColumns
_WAVE_BYTES = 2 << 20  # native/attention_tiles.cpp: kBudget
_TENSORS = 6  # of a quantised weight among an operation's arguments


def linear(a: list[Tensor], factors: list[Any], sizes: list[int], *_: Any) -> list[int]:
    """Activations packed once for all that multiply them, and each thread's sums."""
    M = a[0].shape[0]
    found = {
        (id(x), x.shape[1]): _packed_bytes(x) for i, x in enumerate(a) if M > _FEW_ROWS or sizes[3 * i] == 0
    }
    return [*found.values(), *_sums_of_forward(M)]


def linear_grad(a: list[Tensor], factors: list[Any], sizes: list[int], *_: Any) -> list[int]:
    """Copies of activations that are no lanes as they lie, and each thread's sums."""
    copies = [
        4 * x.shape[0] * _lanes(x.shape[1], x.dtype)
        for x in a
        if not (
            x.dtype == torch.float32 or (_pairs(x.dtype) and x.shape[1] % 2 == 0 and x.stride(0) % 2 == 0)
        )
    ]
    each = 4 * _PANEL
    return [*copies, *[each * _DEPTH, each * _BACKWARD_ROWS * _BACKWARD_PANELS] * torch.get_num_threads()]


def linear_4bit(x: Tensor, *_: Any) -> list[int]:
    """As `linear` for one product."""
    rows = x.reshape(-1, x.shape[-1])
    return [_packed_bytes(rows), *_sums_of_forward(len(rows))]


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, *_: Any) -> list[int]:
    """Keys and values of a wave of documents as lanes."""
    return _wave(q, k, documents, rows=1, sums=0)


def attention_grad(*arguments: Any) -> list[int]:
    """Keys and values of a wave of documents as lanes, and the sums of their gradients."""
    _, q, k, _, _, _, documents, *_ = arguments
    return _wave(q, k, documents, rows=2, sums=2)


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *settings: Any
) -> list[int]:
    """A chunk of logits, the hidden states packed, and the head in the hidden states' dtype."""
    (P, H), V = hidden.shape, len(weight)
    rows = min(P, chunk_rows(P, V, 4))
    blocks = [rows * V * 4, _packed_bytes(hidden[:rows]), *_sums_of_forward(rows), P * 16]
    if weight.dtype != hidden.dtype:
        blocks.append(V * H * hidden.element_size())
    wanted = settings[-1]
    if not isinstance(wanted, bool) and wanted[1] and hidden.dtype != torch.float32:
        blocks += [PANEL * H * hidden.element_size()] * 2
    return blocks


def token_losses(hidden: Tensor, weight: Tensor, *settings: Any) -> list[int]:
    """As `head_loss`."""
    return head_loss(hidden, weight, *settings)


def _pairs(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and multiplies_bfloat16()


def _lanes(count: int, dtype: torch.dtype) -> int:
    return math.ceil(count / 2) if _pairs(dtype) else count


def _packed_bytes(x: Tensor) -> int:
    tokens = math.ceil(min(x.shape[0], _TOKENS) / _PANEL) * _PANEL
    return 4 * tokens * _lanes(x.shape[1], x.dtype)


def _sums_of_forward(M: int) -> list[int]:
    panels = math.ceil(min(M, _TOKENS) / _PANEL)
    one = [4 * _ROWS_AT_ONCE * _DEPTH, 4 * panels * _ROWS_AT_ONCE * _PANEL, 4 * _ROWS_AT_ONCE * _PANEL]
    return one * torch.get_num_threads()


def _wave(q: Tensor, k: Tensor, documents: Tensor, rows: int, sums: int) -> list[int]:
    """The largest of the waves that documents are computed in."""
    D, threads = q.shape[3], torch.get_num_threads()
    per_lane = 2 if _pairs(q.dtype) else 1
    lanes = math.ceil(D / per_lane)
    each = []
    for length in (documents[:, 2] - documents[:, 1]).tolist():
        along = math.ceil(length / (_PANEL * per_lane)) * D * _PANEL
        of_sums = math.ceil(length / _PANEL) * math.ceil(D / _PANEL) * _PANEL * _PANEL
        each += [(4 * (rows * length * lanes + along), 4 * sums * of_sums)] * k.shape[2]
    each.sort(reverse=True)
    wave, used = 0, 0
    for count, (packed, summed) in enumerate(each):
        if used + packed + summed > _WAVE_BYTES * threads and count >= threads:
            break
        wave, used = wave + packed, used + packed + summed
    return [wave, used - wave] if sums else [wave]


SCRATCH: dict[str, Callable[..., list[int]]] = {
    f"halfbyte::{function.__name__}": function
    for function in (linear, linear_grad, linear_4bit, attention, attention_grad, head_loss, token_losses)
}
"""By the names of torch's operations."""

KINDS = {"halfbyte::head_loss": "loss", "halfbyte::token_losses": "loss"}
"""What operations make and take for something else than the rest around them."""
