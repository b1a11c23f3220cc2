"""A batch as the arguments of a transformers model.

It owns the names under which a model is told where documents begin and end; it must not know losses or what a
model makes of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.data.pack import Batch
from halfbyte.data.seq2seq import Seq2SeqBatch


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The arguments of a forward pass, without labels.

    A packed batch goes in without an attention mask: its positions restart with every document, and the bounds of
    the documents stand beside them for attention that reads those.

    Args:
        batch: One batch.
        device: Where the model is.

    Returns:
        `input_ids` (B, T) int64; with padding `attention_mask` (B, T) int64; packed `position_ids` (1, T) int64,
        `cu_seq_lens_q` and `cu_seq_lens_k` (n + 1,) int32, `max_length_q` and `max_length_k`. Of prompts and answers
        `input_ids` and `attention_mask` (B, S), `decoder_input_ids` and `decoder_attention_mask` (B, T).

    Source: transformers, `FlashAttentionKwargs` and `masking_utils.find_packed_sequence_indices`.
    """
    inputs: dict[str, Any] = {"input_ids": torch.from_numpy(batch.input_ids).to(device), "use_cache": False}
    if isinstance(batch, Seq2SeqBatch):
        return {
            "input_ids": torch.from_numpy(batch.source_ids).to(device),
            "attention_mask": torch.from_numpy(batch.source_mask).to(device),
            "decoder_input_ids": inputs["input_ids"],
            "decoder_attention_mask": torch.from_numpy(batch.attention_mask).to(device),
            "use_cache": False,
        }
    if not batch.is_packed:
        return inputs | {"attention_mask": torch.from_numpy(batch.attention_mask).to(device)}
    bounds = torch.from_numpy(batch.cu_seqlens).to(device)
    longest = int(batch.lengths.max())
    return inputs | {
        "attention_mask": None,
        "position_ids": torch.from_numpy(batch.position_ids).to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def first_position(model: PreTrainedModel) -> int:
    """Where positions begin: RoBERTa's, behind that of padding."""
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
