"""Proof, on the model at hand, that documents packed into one row do not see each other.

It owns the proof and its refusal; it must not know rows, training or which attention is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.data.pack import Batch, pack
from halfbyte.data.tokenise import Example
from halfbyte.errors import HalfbyteError, ModelError
from halfbyte.model.encoders import document_logits, hidden_states
from halfbyte.model.inputs import model_inputs
from halfbyte.model.limits import Limits
from halfbyte.model.mode import measured
from halfbyte.model.purpose import Purpose, purpose_of

LENGTHS = (7, 1, 12, 5)
"""Tokens of the documents of the proof: odd, one of a single token, of which nothing but itself is seen."""
KEPT = 2
"""Documents at the end whose tokens stay while those before them change."""


Answers = Callable[[PreTrainedModel, Batch], Tensor]
"""What a model makes of documents in one row: a row of numbers for each token, or for each document."""


def _token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits: Tensor = model(**model_inputs(batch, model.device)).logits[0]
    return logits


def _token_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    return hidden_states(model, batch)[0]


ANSWERS: dict[Purpose, tuple[Answers, ...]] = {
    "generate": (_token_logits,),
    "classify": (_token_states, document_logits),
    "tag": (_token_states,),
    "embed": (_token_states,),
}
"""What is compared: what an encoder's head is given, and what one makes of whole documents."""


def prove_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which packed documents see each other, or stand at positions that are not theirs.

    Two packed rows of the same shape differ in the tokens of their first documents only; the answers to the others
    must be the same to the bit, since masked tokens enter with a weight of exactly zero. Then each document alone
    must give what it gives packed, within rounding.

    Args:
        model: A causal language model, or an encoder with what stands on it; it is left as it was found.

    Raises:
        ModelError: HB317 where either does not hold, or the model refuses packed documents itself.
    """
    for answers in ANSWERS[purpose_of(model)]:
        _prove(model, answers)


def _prove(model: PreTrainedModel, answers: Answers) -> None:
    random = np.random.default_rng(0)
    limits = Limits.of(model)
    first = [random.integers(0, limits.vocabulary, length) for length in LENGTHS]
    other = [(ids + 1) % limits.vocabulary for ids in first[:-KEPT]] + first[-KEPT:]
    with measured(model):
        try:
            packed, changed = (answers(model, _row(ids)) for ids in (first, other))  # (T, V)
        except HalfbyteError:  # of the model's file, say
            raise
        except (
            Exception
        ) as fault:  # a model's own refusal, of any kind; it is told, with its cause, not hidden
            raise _refusal(model, f"it fails on packed rows: {type(fault).__name__}: {fault}") from fault
        alone = torch.cat([answers(model, _row([ids])) for ids in first])  # (T, V)
    kept = KEPT if len(packed) == len(LENGTHS) else sum(LENGTHS[-KEPT:])
    moved = (packed[-kept:] - changed[-kept:]).abs().max().item()
    if not moved == 0.0:
        raise _refusal(model, f"a row's logits move by {moved:.3g} when the rows before it change")
    off = _relative_difference(packed, alone)
    # Rounding is of the order of eps and another answer of the order of 1; sqrt(eps) lies as far from both.
    if not off <= torch.finfo(model.dtype).eps ** 0.5:
        raise _refusal(model, f"a packed row's logits are {off:.1%} away from those of the row alone")


def _row(documents: list[np.ndarray]) -> Batch:
    """Documents packed into one row."""
    return pack(
        [
            Example(ids.astype(np.int32), np.ones(len(ids), np.bool_), None, None, "", "", truncated=False)
            for ids in documents
        ]
    )


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference over the expected values' spread."""
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().std())


def _refusal(model: PreTrainedModel, what: str) -> ModelError:
    return ModelError("HB317", what, where=type(model).__name__, fix="set train.packing to false")
