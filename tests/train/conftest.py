"""A tiny causal language model with random weights, and rows of unequal length for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from halfbyte.data.tokenise import Example

VOCABULARY = 50


@pytest.fixture
def tiny_llama() -> Callable[[], PreTrainedModel]:
    """Builds the same float32 model each time it is called: 2 layers, hidden size 24."""

    def build() -> PreTrainedModel:
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config)

    return build


@pytest.fixture
def rows() -> list[Example]:
    """Eight rows of 5 to 33 tokens, of which 1 to all but the first few are trained."""
    random = np.random.default_rng(11)
    examples = []
    for number, (length, prompt) in enumerate(
        [(5, 4), (9, 3), (33, 2), (17, 12), (8, 1), (21, 20), (13, 6), (30, 5)]
    ):
        trained = np.zeros(length, dtype=np.bool_)
        trained[prompt:] = True
        examples.append(
            Example(
                input_ids=random.integers(0, VOCABULARY, length).astype(np.int32),
                trained=trained,
                prompt_ids=None,
                answer=None,
                id=f"{number:016x}",
                where=f"rows.jsonl:{number + 1}",
                truncated=False,
            )
        )
    return examples
