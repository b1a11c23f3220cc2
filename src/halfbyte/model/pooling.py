"""A text's vector: the hidden states of its tokens pooled, and brought to length 1.

It owns the ways of pooling and where a model folder says which is its own; it must not know losses or rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.errors import ModelError
from halfbyte.model.encoders import hidden_states
from halfbyte.model.files import contained, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch

Pooling = Literal["mean", "cls"]
FILE = Path("1_Pooling") / "config.json"
"""Of sentence-transformers."""
_MODES: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def pooling_of(folder: Path) -> Pooling:
    """How a model folder says its tokens are pooled; the mean where it says nothing.

    Raises:
        ModelError: HB353 for a way that is none of ours, HB301 or HB305 for a file that cannot be read.
    """
    if not (folder / FILE).exists():
        return "mean"
    said = read_json(contained(folder, str(FILE)))
    asked = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
    if len(asked) == 1 and asked[0] in _MODES:
        return _MODES[asked[0]]
    raise ModelError(
        "HB353",
        f"it asks for {', '.join(asked) or 'no way of pooling'}, expected one of {', '.join(_MODES)}",
        where=str(folder / FILE),
        fix="use a model that pools by the mean or the first token",
    )


def document_vectors(model: PreTrainedModel, batch: Batch, pooling: Pooling) -> Tensor:
    """A vector of length 1 for each document, (n, H) float32.

    Args:
        model: An encoder without a head.
        batch: Packed or padded documents.
        pooling: The mean over a document's tokens, or its first token.
    """
    states = hidden_states(model, batch).float()  # (B, T, H)
    bounds = torch.from_numpy(batch.documents).long().to(states.device)
    row, begin, end = bounds.unbind(1)
    if pooling == "cls":
        return F.normalize(states[row, begin], dim=1)
    owner = torch.repeat_interleave(torch.arange(len(row), device=states.device), end - begin)  # (P,)
    place = torch.arange(len(owner), device=states.device)
    place = place - torch.repeat_interleave((end - begin).cumsum(0) - (end - begin), end - begin)
    tokens = states[row[owner], begin[owner] + place]  # (P, H)
    sums = states.new_zeros(len(row), states.shape[2]).index_add(0, owner, tokens)
    return F.normalize(sums / (end - begin)[:, None], dim=1)
