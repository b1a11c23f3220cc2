"""Promises of the output head: the whole model's logits and gradients, computed only where they are needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from halfbyte.data.pack import UNTRAINED
from halfbyte.model import heads

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "gemma2, whose logits are capped": Gemma2Config(**SMALL, **HEADS, final_logit_softcapping=0.05),
    "gpt2, tied": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}

# One product of 32 float32 terms, taken over other rows: 32 x 2^-24 of logits below 1, times 10 for the layers.
LOGIT_TOLERANCE = 2e-5


def trained_logits(model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """The way of every head that is not dense: logits (P, V) where the next label is trained, and those labels."""
    selected, targets = heads._positions(labels)
    return heads._logits(model, inputs, selected), targets


def built(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rows() -> tuple[dict[str, Any], Tensor]:
    """Inputs and labels (3, 9) of rows of 9, 5 and 7 tokens, trained at the end, one from the start."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 61, (3, 9), generator=generator)
    mask, labels = torch.ones(3, 9, dtype=torch.long), torch.full((3, 9), UNTRAINED)
    for row, (begin, end) in enumerate([(4, 9), (0, 5), (6, 7)]):
        labels[row, begin:end] = input_ids[row, begin:end]
        mask[row, end:] = 0
    return {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}, labels


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_the_whole_model(config: PretrainedConfig) -> None:
    model = built(config)
    inputs, labels = rows()
    logits, targets = trained_logits(model, inputs, labels)
    positions = [(row, t) for row in range(3) for t in range(8) if labels[row, t + 1] != UNTRAINED]
    whole = model(**inputs).logits
    torch.testing.assert_close(
        logits, torch.stack([whole[at] for at in positions]), atol=LOGIT_TOLERANCE, rtol=0.0
    )
    assert targets.tolist() == [int(labels[row, t + 1]) for row, t in positions]
    assert logits.dtype == torch.float32


def test_loss_and_gradients_are_those_of_transformers() -> None:
    model = built(CONFIGS["llama"])
    inputs, labels = rows()
    theirs = model(**inputs, labels=labels).loss
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = F.cross_entropy(*trained_logits(model, inputs, labels))
    ours.backward()
    torch.testing.assert_close(ours, theirs, atol=LOGIT_TOLERANCE, rtol=0.0)
    assert expected
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=LOGIT_TOLERANCE, rtol=0.0)


def test_head_sees_only_the_positions_it_is_needed_for() -> None:
    model = built(CONFIGS["llama"])
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.numel() // 61))
    logits, _ = trained_logits(model, *rows())
    assert seen == [len(logits)] == [5 + 4 + 1]


def test_model_is_left_without_hooks_even_after_an_error() -> None:
    model = built(CONFIGS["llama"])
    inputs, labels = rows()
    with pytest.raises(IndexError):
        trained_logits(model, inputs | {"input_ids": inputs["input_ids"] + 61}, labels)
    assert not model.lm_head._forward_pre_hooks
    assert model(**inputs).logits.shape == (3, 9, 61)


def test_model_that_does_not_call_its_head_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(CONFIGS["llama"])
    expected, _ = trained_logits(model, *rows())
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    found, _ = trained_logits(model, *rows())
    torch.testing.assert_close(found, expected, atol=LOGIT_TOLERANCE, rtol=0.0)
