"""The output head, applied only where a label is trained.

It owns the selection of positions before the head; it must not know whether a loss is trained or measured
with the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.data.pack import UNTRAINED


def trained_logits(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits at the positions whose next label is trained, and those labels.

    The hidden states are selected just before the model's own output head, so that whatever the model does
    to its logits afterwards (soft caps, scaling) is done as always. On instruction data most positions are
    prompt or padding, and a (B, T, V) tensor of logits is the largest thing in a step; it never exists here.

    Args:
        model: A causal language model of transformers.
        input_ids: (B, T) int64.
        attention_mask: (B, T), 0 on padding; None where nothing is padded.
        labels: (B, T) int64, aligned with `input_ids` (not shifted), `UNTRAINED` on untrained tokens. The
            label of the first token has nothing before it that could predict it and is not used.

    Returns:
        Logits (P, V) float32 and targets (P,) int64, in reading order of the rows.
    """
    trained = labels != UNTRAINED
    selected = torch.zeros_like(trained)
    selected[:, :-1] = trained[:, 1:]  # (B, T): the next label is trained
    targets = labels[:, 1:][trained[:, 1:]]  # (P,)
    applied = False

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal applied
        applied = True
        return (args[0][selected].unsqueeze(0), *args[1:])  # (B, T, D) -> (1, P, D)

    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    # A model that never calls its head as a module has computed every position.
    return (logits[0] if applied else logits[selected]).float(), targets
