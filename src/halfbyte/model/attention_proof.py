"""Proof, layer by layer, that attention keeps packed documents apart on the live backend and dtype.

It owns the proof and its refusal; it must not know which attention is in use, nor rows or training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError

LENGTHS = (6, 9)
"""Tokens of the two documents: even and odd."""


def check_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which one packed document changes what attention gives for the next.

    A row of two documents goes through the model's own path twice, the second time with another first document; what
    every attention layer gives for the second document must be the same to the bit, since what it does not see
    enters nowhere. Alone in a row it must come out the same within rounding.

    Args:
        model: A causal language model; it is left as it was found.

    Raises:
        ModelError: HB330 with the layer where it shows first.
    """
    first, second = LENGTHS
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (1, first + second), generator=torch.Generator().manual_seed(0))
    other = torch.cat([(ids[:, :first] + 1) % vocabulary, ids[:, first:]], dim=1)
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            packed, changed = _given(model, ids, LENGTHS), _given(model, other, LENGTHS)
            alone = _given(model, ids[:, first:], (second,))
    finally:
        model.train(was_training)
    for (name, layer, before), (_, _, after), (_, _, single) in zip(packed, changed, alone, strict=True):
        if not torch.equal(before[:, first:], after[:, first:]):
            moved = (before[:, first:] - after[:, first:]).abs().max().item()
            raise _refusal(
                layer, name, f"changes a document by {moved:.3g} when the one packed before it changes"
            )
        off = _relative_difference(before[:, first:], single)
        # Rounding is of the order of eps, another answer of the order of 1; sqrt(eps) lies as far from both.
        if not off <= torch.finfo(single.dtype).eps ** 0.5:
            raise _refusal(layer, name, f"gives a packed document {off:.1%} away from the same one alone")


def _given(
    model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]
) -> list[tuple[str, nn.Module, Tensor]]:
    """What each attention layer gave, (1, T, …), and at the end what the model gave."""
    found: list[tuple[str, nn.Module, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, _: object, output: object) -> None:
            given = output[0] if isinstance(output, tuple) else output
            if isinstance(given, Tensor) and given.dim() == 3:
                found.append((name, layer, given))

        return hook

    base: nn.Module = getattr(model, model.base_model_prefix, model)
    layers = {
        name: layer for name, layer in base.named_modules() if "attention" in type(layer).__name__.lower()
    }
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    try:
        last = base(
            input_ids=ids.to(model.device),
            attention_mask=None,
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(model.device),
            cu_seq_lens_q=bounds.to(model.device),
            cu_seq_lens_k=bounds.to(model.device),
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            use_cache=False,
        ).last_hidden_state
    except Exception as fault:  # a model's own refusal, of any kind; it is told, with its cause, not hidden
        raise _refusal(model, "", f"fails on packed rows: {type(fault).__name__}: {fault}") from fault
    finally:
        for handle in handles:
            handle.remove()
    return [*found, ("", model, last)]


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference over the expected values' own."""
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def _refusal(layer: nn.Module, name: str, what: str) -> ModelError:
    return ModelError(
        "HB330",
        f"{type(layer).__name__} {what}",
        where=name,
        fix="set train.packing to false, and report the model's type and the versions of `halfbyte doctor`",
    )
