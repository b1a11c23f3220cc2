"""Promises of a model's limits: read off the model, with or without weights, and rows beyond them all named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from halfbyte.data.tokenise import Example
from halfbyte.errors import DataError
from halfbyte.model.files import open_model_folder
from halfbyte.model.limits import Limits
from halfbyte.model.loading import load
from halfbyte.model.skeleton import build_skeleton

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
LIMITS = Limits(vocabulary=61, outputs=61, positions=9)


def example(ids: list[int], trained: list[int] | None = None, prompt: list[int] | None = None) -> Example:
    number = len(ids)
    return Example(
        np.array(ids, np.int32),
        np.array(trained if trained is not None else [True] * number, np.bool_),
        np.array(prompt, np.int32) if prompt is not None else None,
        None,
        str(number),
        f"rows.jsonl:{number}",
        truncated=False,
    )


def fault(limits: Limits, *examples: Example) -> str:
    with pytest.raises(DataError) as caught:
        limits.check(examples)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (LlamaConfig(**SMALL, num_attention_heads=4, max_position_embeddings=77), Limits(61, 61, 77)),
        (GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=33), Limits(61, 61, 33)),
        (BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4), Limits(61, 61, None)),
    ],
    ids=["rotary", "learned", "none"],
)
def test_limits_are_the_model_s_own(config: PretrainedConfig, limits: Limits) -> None:
    assert Limits.of(AutoModelForCausalLM.from_config(config)) == limits


def test_an_embedding_may_be_longer_than_the_head() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL, num_attention_heads=4, tie_word_embeddings=False)
    )
    model.model.embed_tokens = torch.nn.Embedding(64, 32)
    assert (Limits.of(model).vocabulary, Limits.of(model).outputs) == (64, 61)


@pytest.mark.parametrize("name", ["base-11m", "stories260K-hf", "capp-gpt-hf"])
def test_a_folder_s_limits_are_known_without_its_weights(shared: Callable[[str], Path], name: str) -> None:
    path = shared(f"models/{name}")
    without = Limits.of(build_skeleton(open_model_folder(path), torch.float32))
    assert without == Limits.of(load(path, quantization=None, dtype=torch.float32))
    assert without.positions == {"base-11m": 1024, "stories260K-hf": 512, "capp-gpt-hf": 512}[name]


def test_rows_within_the_limits_pass_to_the_last_token() -> None:
    LIMITS.check([example([60] * 9, prompt=[60]), example([0])])
    Limits(61, 61, None).check([example([60] * 1000)])
    LIMITS.check([])


def test_rows_longer_than_the_context_are_all_named() -> None:
    said = fault(LIMITS, example([1] * 10), example([1] * 9), example([1] * 11))
    assert said.startswith("HB212 ")
    for part in (
        "2 of 3 rows are longer than the model's context of 9 tokens",
        "rows.jsonl:10: it has 10 tokens",
        "rows.jsonl:11: it has 11 tokens",
        "set data.max_length to 9 or less",
    ):
        assert part in said


@pytest.mark.parametrize("strange", [61, 2**31 - 1, -1])
@pytest.mark.parametrize("where", ["ids", "prompt"])
def test_ids_outside_of_the_vocabulary_are_refused(strange: int, where: str) -> None:
    row = example([1, strange], [0, 0]) if where == "ids" else example([1, 2], prompt=[strange])
    said = fault(LIMITS, example([1]), row)
    assert said.startswith("HB213 ")
    assert "1 of 2 rows hold ids outside of the model's 61 tokens" in said
    assert f"rows.jsonl:2: it holds the ids {strange}" in said


def test_a_target_the_head_cannot_predict_is_refused_and_a_prompt_with_it_is_not() -> None:
    limits = Limits(vocabulary=64, outputs=61, positions=None)
    limits.check([example([1, 62, 60], [0, 0, 1])])
    said = fault(limits, example([1, 2, 62], [0, 0, 1]))
    assert "64 tokens, 61 of which it can predict" in said
    assert "ids 62" in said


def test_many_strange_ids_are_shortened() -> None:
    assert "ids 70, 71, 72, 73, 74 and 2 more" in fault(LIMITS, example(list(range(70, 77)), [0] * 7))


def test_a_vocabulary_fault_is_told_before_a_length() -> None:
    assert fault(LIMITS, example([99] * 10)).startswith("HB213 ")
