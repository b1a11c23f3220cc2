"""Tiny encoders of several families with random weights, and batches of documents for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from halfbyte.data.encoder_texts import EncodedExample

VOCABULARY = 120
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # so that answers differ by more than rounding
}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
PACKING: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 1},
    "xlm-roberta": _BERT | {"pad_token_id": 1},
    "distilbert": _DISTILBERT,
    "electra": _BERT | {"embedding_size": 16},
    "albert": _BERT | {"embedding_size": 16},
}
"""Families that take documents end to end."""
PADDING: dict[str, dict[str, Any]] = {
    "deberta-v2": _BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "mpnet": _BERT | {"pad_token_id": 1},
    "modernbert": _BERT
    | {"local_attention": 16, "global_attn_every_n_layers": 2}
    | dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}
"""Families with attention of their own, or windows."""
FAMILIES = PACKING | PADDING


def save_encoder(family: str, folder: Path, *, head: bool = False) -> PreTrainedModel:
    """Write a family's model without a head, or with one for three labels."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    if head:
        config.id2label = {0: "a", 1: "b", 2: "c"}
    kind = AutoModelForSequenceClassification if head else AutoModel
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    return model


def documents(*lengths: int, seed: int = 0) -> list[EncodedExample]:
    """Documents of random tokens, none of them padding's."""
    random = np.random.default_rng(seed)
    return [
        EncodedExample(
            random.integers(2, VOCABULARY, length).astype(np.int32),
            np.zeros(length, np.bool_),
            *(None, None, f"row {number}", f"rows:{number}"),
            truncated=False,
            targets=random.integers(0, 3, length),
        )
        for number, length in enumerate(lengths)
    ]
