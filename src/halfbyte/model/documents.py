"""Which tokens belong together: from masks, positions and bounds, as transformers gives them, to documents.

It owns the meaning of transformers' masks and their short form; it must not know which attention reads them.

A mask's short form is an (n, 4) int32 tensor, one row for each document: batch row, first token, token after the
last, window (0 where there is none, -1 where tokens see later ones too). It says what a mask of T x T numbers says,
as long as every document is a run of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils

from halfbyte.kernels.scope import Scope

Mask = Callable[..., Any]

BOTH_WAYS = -1
"""In place of a short form's window: every token sees its whole document."""


class Pattern(NamedTuple):
    """What a mask function of transformers says, padding aside.

    Args:
        window: Token i sees token j only if i - window < j; 0 for no such limit.
        packed: (B, T) numbers of documents; None where each row is one.
        causal: Whether no token sees a later one.
    """

    window: int = 0
    packed: Tensor | None = None
    causal: bool = True


class Told(NamedTuple):
    """What a call of attention says about who sees whom.

    Args:
        documents: (n, 3) int32, see `kernels.attention`.
        window: As in `Pattern`, where the mask was made for this kind of layer; None where it says nothing of it.
        both_ways: Whether the mask says that tokens see later ones too.
    """

    documents: Tensor
    window: int | None = None
    both_ways: bool = False


def documents_of(B: int, T: int, mask: Tensor | None, features: Mapping[str, Any]) -> Told | None:
    """What a model was told, in this order: bounds of packed documents, the mask, positions that restart, whole rows.

    Args:
        B: Batch rows.
        T: Tokens, all of them of this call.
        mask: (B, T) with 0 on padding, or a short form, or None.
        features: What else the model passes on: `cu_seq_lens_q`, `position_ids`.

    Returns:
        None where the mask says more than documents can, or another thing.
    """
    bounds, window, both_ways = features.get("cu_seq_lens_q"), None, False
    if mask is None:
        documents = from_positions(features.get("position_ids"), B, T)
    elif mask.dim() != 2:
        return None
    elif is_short(mask):  # made for this kind of layer: surer than what a layer says of itself
        documents, said = mask[:, :3], int(mask[0, 3]) if len(mask) else 0
        window, both_ways = max(said, 0), said == BOTH_WAYS
    else:
        short = from_padding(mask, B, T)
        if short is None:
            return None
        documents = short[:, :3]
    if bounds is not None and B == 1:
        documents = from_bounds(bounds, T)
    return Told(whole_rows(B, T) if documents is None else documents, window, both_ways)


def _code(function: Mask | None) -> CodeType | None:
    return getattr(function, "__code__", None)


# Mask functions are closures; two that were made by the same line of transformers share their code object.
_AND = _code(masking_utils.and_masks(masking_utils.causal_mask_function))
_WINDOW = _code(masking_utils.sliding_window_overlay(1))
_PACKED = _code(masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)))
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # transformers 5.10 does without
_BOTH_WAYS = getattr(masking_utils, "bidirectional_mask_function", None)
_REMAPPED = _code(_remap(masking_utils.causal_mask_function, torch.zeros(1, 1))) if _remap else None


def pattern_of(function: Mask) -> Pattern | None:
    """What a mask function says, if it is causal with at most a window and packed documents, or both ways without a
    window; else None.

    Args:
        function: As `masking_utils` makes them.
    """
    if _BOTH_WAYS is not None and function is _BOTH_WAYS:
        return Pattern(causal=False)
    parts = _parts(function)
    if masking_utils.causal_mask_function not in parts:
        return None
    window, packed = 0, None
    for part in parts:
        cells = _cells(part)
        if part is masking_utils.causal_mask_function:
            continue
        if _code(part) == _WINDOW and isinstance(cells["sliding_window"], int) and not window:
            window = cells["sliding_window"]
        elif _code(part) == _PACKED and packed is None:
            packed = cells["packed_sequence_mask"]
        else:
            return None
    return Pattern(window, packed) if window >= 0 else None


def _parts(function: Mask) -> list[Mask]:
    """The functions whose intersection this is; positions that restart change nothing within a document."""
    if _code(function) == _AND:
        return [part for each in _cells(function)["mask_functions"] for part in _parts(each)]
    if _REMAPPED is not None and _code(function) == _REMAPPED:
        return _parts(_cells(function)["mask_function"])
    return [function]


def _cells(function: Mask) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def short_mask(pattern: Pattern, B: int, T: int, padding: Tensor | None) -> Tensor | None:
    """The short form of a mask; None where a row's unpadded tokens are no single run.

    Args:
        pattern: What the mask function says.
        B: Batch rows.
        T: Tokens.
        padding: (B, T) bool, False on padding; or None.
    """
    numbers = torch.zeros(B, T, dtype=torch.int64) if pattern.packed is None else pattern.packed
    if padding is not None:
        kept = padding[:, :T].bool()
        if (_runs(kept.long()) & kept).sum() > kept.any(1).sum():
            return None
        numbers = torch.where(kept, numbers.expand(B, T), -1)
    documents = from_numbers(numbers.expand(B, T))
    window = pattern.window if pattern.causal else BOTH_WAYS
    return torch.cat([documents, torch.full_like(documents[:, :1], window)], dim=1)


def from_numbers(numbers: Tensor) -> Tensor:
    """Documents (n, 3) of runs of equal numbers (B, T), negative ones left out."""
    starts = _runs(numbers)
    row, first = starts.nonzero(as_tuple=True)
    T = numbers.shape[1]
    flat = row * T + first
    end = torch.cat([flat[1:], flat.new_tensor([numbers.numel()])]) - row * T
    documents = torch.stack([row, first, end], dim=1).to(torch.int32)
    return documents[numbers[row, first] >= 0]


def _runs(numbers: Tensor) -> Tensor:
    """(B, T) bool: where a run of equal numbers begins."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return starts


@lru_cache(maxsize=64)
def whole_rows(B: int, T: int) -> Tensor:
    """Documents (B, 3): each row is one."""
    row = torch.arange(B, dtype=torch.int32)
    return torch.stack([row, torch.zeros_like(row), torch.full_like(row, T)], dim=1)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _once(key: Tensor, make: Callable[[], Tensor | None]) -> Tensor | None:
    """What `make` returns, made once for a tensor that every layer of a model is given."""
    version = 0 if key.is_inference() else key._version
    known: tuple[int, Tensor | None] | None = _known.get(key)  # type: ignore[no-untyped-call]
    if known is None or known[0] != version:
        known = version, make()
        _known[key] = known
    return known[1]


def from_bounds(bounds: Tensor, T: int) -> Tensor:
    """Documents of one packed row.

    Args:
        bounds: (n + 1,) where documents begin, and where the last one ends: `cu_seq_lens_q` of transformers.
        T: Tokens; those behind the last document are padding.
    """

    def make() -> Tensor:
        ends = bounds.to(device="cpu", dtype=torch.int32)
        row = torch.zeros_like(ends[1:])
        documents = torch.stack([row, ends[:-1], ends[1:].clamp(max=T)], dim=1)
        return documents[documents[:, 1] < documents[:, 2]]

    found = _once(bounds, make)
    assert found is not None
    return found


def from_positions(positions: Tensor | None, B: int, T: int) -> Tensor | None:
    """Documents of rows whose positions restart; None where none does.

    Args:
        positions: (B, T) or (1, T); anything else counts as positions that do not restart.
        B: Batch rows.
        T: Tokens.
    """
    if (
        positions is None
        or positions.dim() != 2
        or positions.shape[0] not in {1, B}
        or positions.shape[1] != T
    ):
        return None

    def make() -> Tensor | None:
        restarts = positions[:, 1:] - positions[:, :-1] != 1
        if not restarts.any():
            return None
        numbers = torch.nn.functional.pad(restarts.cumsum(1), (1, 0))
        return from_numbers(numbers.expand(B, T).cpu())

    return _once(positions, make)


def from_padding(padding: Tensor, B: int, T: int) -> Tensor | None:
    """The short form of a mask (B, T), not 0 on tokens; None where a row's tokens are no single run."""
    return _once(padding, lambda: short_mask(Pattern(), B, T, padding.cpu().bool()))


def is_short(mask: Tensor) -> bool:
    """Whether a mask is the short form."""
    return mask.dtype == torch.int32 and mask.dim() == 2 and mask.shape[1] == 4


def full_mask(documents: Tensor, B: int, T: int, causal: bool, window: int) -> Tensor:
    """The long form, for attention that reads nothing else.

    Returns:
        (B, 1, T, T) bool; entry (b, 0, i, j) says whether token i sees token j. Padding sees itself: a row without
        any entry has no softmax.
    """
    scope = Scope(documents, scale=1.0, causal=causal, window=window)
    return (scope.visible(B, T) | torch.eye(T, dtype=torch.bool))[:, None]
