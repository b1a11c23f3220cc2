"""Documents through an encoder, packed or padded: classes of documents, classes of tokens, vectors.

It owns how a packed row is told to an encoder and how each document's answer is had from it; it must not know rows,
losses or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.data.encoder_texts import EncodedBatch
from halfbyte.data.images.batch import ImageBatch
from halfbyte.data.pack import Batch
from halfbyte.model.attention import NAME
from halfbyte.model.inputs import first_position, model_inputs

WINDOWS = ("sliding_window", "local_attention")
"""Settings of encoders in which a token sees only its neighbourhood: their masks say nothing of packed documents."""


def encoder_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The arguments of a forward pass.

    Args:
        model: An encoder, with a head or without.
        batch: One batch.

    Returns:
        As `model_inputs`, with `token_type_ids` (B, T) where the batch has segments; positions begin where those of
        the model's family do.
    """
    inputs = model_inputs(batch, model.device)
    del inputs["use_cache"]
    first = first_position(model)
    if batch.is_packed or first:
        inputs["position_ids"] = torch.from_numpy(batch.position_ids + first).to(model.device)
    if isinstance(batch, EncodedBatch) and batch.segments is not None:
        inputs["token_type_ids"] = torch.from_numpy(batch.segments).to(model.device)
    return inputs


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The encoder's last hidden states, (B, T, H)."""
    states: Tensor = model.base_model(**encoder_inputs(model, batch))[0]
    return states


def document_logits(model: PreTrainedModel, batch: Batch | ImageBatch) -> Tensor:
    """Logits of each document's class, (n, C) float32.

    Args:
        model: An encoder that classifies documents by their first token, where they are packed.
        batch: Packed or padded documents; or images.
    """
    if isinstance(batch, ImageBatch):
        seen: Tensor = model(pixel_values=torch.from_numpy(batch.pixel_values).to(model.device)).logits
        return seen.float()
    with _first_tokens(model, batch):
        logits: Tensor = model(**encoder_inputs(model, batch)).logits
    return logits.float()


def token_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of each token's class, (B, T, C) float32."""
    logits: Tensor = model(**encoder_inputs(model, batch)).logits
    return logits.float()


@contextmanager
def _first_tokens(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Give whatever reads the first token of each row the first token of each packed document instead."""
    if not batch.is_packed:
        yield
        return
    first = torch.from_numpy(batch.documents[:, 1]).to(model.device).long()

    def select(_: nn.Module, __: object, output: Any) -> Any:
        states = output["last_hidden_state"]
        output["last_hidden_state"] = states[0, first][:, None]  # (1, T, H) -> (n, 1, H)
        return output

    layers = getattr(model.base_model, "encoder", model.base_model)  # before a pooler, where there is one
    hook = layers.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def unpackable(model: PreTrainedModel) -> str:
    """Why documents of this model cannot be packed, or an empty text; weights without memory will do.

    Where this finds nothing, `prove_isolation` proves it on the model with its weights.
    """
    config = model.config.get_text_config()
    kind = type(model).__name__
    if any(getattr(config, name, None) is not None for name in WINDOWS):
        return f"in layers of {kind} tokens see a window only"
    if model.config._attn_implementation != NAME:
        return f"{kind} computes attention with code of its own, or the native kernels are not in use"
    return ""
