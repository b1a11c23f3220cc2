"""The held-out loss: how surprised a model is by the trained tokens of rows it has not seen.

It owns the per-item sums, their interval and the perplexity; it must not know files or how rows became
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from halfbyte.data.examples import Learnable
from halfbyte.data.pack import UNTRAINED, Batch, collate
from halfbyte.errors import EvaluateError, listed
from halfbyte.evaluate.statistics import Interval, Score, bootstrap_ratio
from halfbyte.model.heads import head_route, trained_token_losses
from halfbyte.model.inputs import model_inputs
from halfbyte.model.mode import measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.tokenise import Example

L = TypeVar("L", bound=Learnable)
Progress = Callable[[int, int], None]
"""Called with the number of items done and of all items."""

Lay = Callable[[Sequence["Example"], int], Batch]
"""Lays examples side by side, filled up with a token id."""

LOGIT_BYTES = 256 << 20
"""Largest float32 logits of one batch of a model whose logits must all exist; the batch is cut shorter, down to one
row, before it passes this."""


@dataclass(frozen=True)
class ItemLoss:
    """The loss of one row.

    Args:
        id: Content hash of the row.
        where: File and line of the row.
        nll: Negative log-likelihood of its trained tokens, summed, in nats.
        tokens: Number of its trained tokens.
    """

    id: str
    where: str
    nll: float
    tokens: int

    @property
    def score(self) -> Score:
        """For `paired_difference`: a ratio of nats to tokens."""
        return Score(self.id, self.nll, self.tokens)


@dataclass(frozen=True)
class LossResult:
    """Loss on held-out rows.

    Args:
        items: One per distinct row, in the order given.
        loss: Nats per trained token, over all items.
        perplexity: Its exponential.
        copies: Rows left out because an equal one is among the items.
    """

    items: tuple[ItemLoss, ...]
    loss: Interval
    perplexity: Interval
    copies: int


def held_out_loss(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    batch_size: int,
    pad_id: int,
    lay: Lay = collate,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> LossResult:
    """Loss per trained token, with an interval over rows; the model is left as it was found.

    Rows are sorted by length so that little is padded; the result does not depend on the batches beyond the
    rounding of the model's own arithmetic. Losses are computed in float32 and summed in float64.

    Args:
        model: A language model of transformers.
        examples: Tokenised rows; equal rows (by id) count once.
        batch_size: Rows at once, at least 1.
        pad_id: Token id of padding; masked, so its value does not matter.
        lay: Makes a batch of rows for this model.
        resamples: Bootstrap resamples of the interval.
        seed: Of the bootstrap.
        progress: Told after each batch.

    Raises:
        EvaluateError: HB603 for no examples or examples without a trained token (all are named), HB604 where
            the loss is not finite.
    """
    distinct = distinct_examples(examples)
    losses: dict[str, ItemLoss] = {}
    with measured(model):
        for batch in _batches(distinct, batch_size, _logit_bytes(model)):
            losses.update((item.id, item) for item in _batch_losses(model, batch, lay(batch, pad_id)))
            if progress is not None:
                progress(len(losses), len(distinct))
    items = tuple(losses[example.id] for example in distinct)
    bad = [item for item in items if not math.isfinite(item.nll)]
    if bad:
        raise EvaluateError(
            "HB604",
            f"the loss of {len(bad)} of {len(items)} rows is {bad[0].nll}",
            where=f"{bad[0].where} is the first",
            fix="compute in float32 or bfloat16 (dtype), and train with a lower learning rate",
        )
    loss = bootstrap_ratio(
        [item.nll for item in items], [item.tokens for item in items], resamples=resamples, seed=seed
    )
    return LossResult(items, loss, loss.map(_exp), len(examples) - len(distinct))


def distinct_examples(examples: Sequence[L]) -> list[L]:
    """The first of each equal rows, in order: copies are no independent evidence.

    Raises:
        EvaluateError: HB603 for no examples.
    """
    if not examples:
        raise EvaluateError("HB603", "got no rows", fix="set data.eval, or data.eval_fraction above 0")
    first: dict[str, L] = {}
    for example in examples:
        first.setdefault(example.id, example)
    return list(first.values())


def _logit_bytes(model: PreTrainedModel) -> int:
    """Bytes of logits that exist for each trained token of a batch."""
    return 0 if head_route(model).way == "dense" else model.config.get_text_config().vocab_size * 4


def _batches(examples: Sequence[Example], batch_size: int, logit_bytes: int) -> Iterator[list[Example]]:
    """Longest rows first, so that memory that does not suffice shows at once."""
    empty = [example.where for example in examples if example.trained_tokens == 0]
    if empty:
        raise EvaluateError("HB603", f"{len(empty)} rows have no trained token:{listed(empty)}")
    batch: list[Example] = []
    trained = 0
    for example in sorted(examples, key=lambda e: e.tokens, reverse=True):
        is_full = len(batch) == batch_size or (trained + example.trained_tokens) * logit_bytes > LOGIT_BYTES
        if batch and is_full:
            yield batch
            batch, trained = [], 0
        batch.append(example)
        trained += example.trained_tokens
    yield batch


def _batch_losses(model: PreTrainedModel, examples: Sequence[Example], batch: Batch) -> Iterator[ItemLoss]:
    labels = torch.from_numpy(batch.labels).to(model.device)
    nll = trained_token_losses(model, model_inputs(batch, model.device), labels)  # (P,)
    row = (labels[:, 1:] != UNTRAINED).nonzero()[:, 0]  # (P,)
    sums = torch.zeros(len(examples), dtype=torch.float64, device=nll.device).index_add(0, row, nll)
    tokens = torch.bincount(row, minlength=len(examples))
    for example, total, count in zip(examples, sums.tolist(), tokens.tolist(), strict=True):
        yield ItemLoss(example.id, example.where, total, count)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700.0 else math.inf
