"""Promises of the held-out loss: the right number, whatever the batches, and a model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.data.tokenise import Example
from halfbyte.errors import EvaluateError
from halfbyte.evaluate import perplexity
from halfbyte.evaluate.perplexity import LossResult, held_out_loss

# Reordered float32 sums over at most 1024 terms in six layers move a logit of size 30 by at most about
# 30 x sqrt(1024) x 2^-24 x 6 = 3e-4 nats at one token; a row's mean over its tokens stays below that.
NATS_PER_TOKEN_TOLERANCE = 3e-4


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def example(name: str, length: int, trained_from: int) -> Example:
    rng = np.random.default_rng(length * 1000 + trained_from)
    ids = rng.integers(0, 97, length).astype(np.int32)
    return Example(ids, np.arange(length) >= trained_from, None, None, name, f"rows.jsonl:{length}", False)


EXAMPLES = [example(f"row{i}", 3 + (i * 7) % 23, 1 + i % 3) for i in range(17)]


def measure(model: LlamaForCausalLM, examples: list[Example] = EXAMPLES, batch_size: int = 4) -> LossResult:
    return held_out_loss(model, examples, batch_size=batch_size, pad_id=0, resamples=200)


def alone(model: LlamaForCausalLM, row: Example) -> float:
    """The row's loss per trained token as transformers computes it, without padding or batch."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(row.trained), ids, -100)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_loss_of_each_row_is_what_transformers_gives_for_it_alone(model: LlamaForCausalLM) -> None:
    found = measure(model)
    for item, row in zip(found.items, EXAMPLES, strict=True):
        assert (item.id, item.where, item.tokens) == (row.id, row.where, row.trained_tokens)
        assert item.nll / item.tokens == pytest.approx(alone(model, row), abs=NATS_PER_TOKEN_TOLERANCE)


def test_loss_is_per_token_over_all_rows_and_perplexity_its_exponential(model: LlamaForCausalLM) -> None:
    found = measure(model)
    tokens = sum(item.tokens for item in found.items)
    assert found.loss.value == pytest.approx(sum(item.nll for item in found.items) / tokens)
    assert found.loss.low < found.loss.value < found.loss.high
    assert found.loss.n == len(EXAMPLES)
    for end in ("value", "low", "high"):
        assert getattr(found.perplexity, end) == pytest.approx(math.exp(getattr(found.loss, end)))


@pytest.mark.parametrize("batch_size", [1, 3, 17, 100])
def test_result_does_not_depend_on_the_batches(model: LlamaForCausalLM, batch_size: int) -> None:
    one, other = measure(model, batch_size=5), measure(model, EXAMPLES[::-1], batch_size)
    by_id = {item.id: item for item in other.items}
    for item in one.items:
        difference = abs(item.nll - by_id[item.id].nll) / item.tokens
        assert difference < NATS_PER_TOKEN_TOLERANCE
    assert [item.id for item in other.items] == [row.id for row in EXAMPLES[::-1]]


def test_batches_stay_below_the_memory_set_for_logits(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(model)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    monkeypatch.setattr(perplexity, "LOGIT_BYTES", 40 * 97 * 4)
    found = measure(model, batch_size=100)
    assert max(rows) <= 40
    assert len(rows) > 5
    assert found.loss.value == pytest.approx(expected.loss.value, abs=NATS_PER_TOKEN_TOLERANCE)


def test_copies_of_a_row_count_once(model: LlamaForCausalLM) -> None:
    found = measure(model, [*EXAMPLES, EXAMPLES[3], EXAMPLES[0]])
    assert found.copies == 2
    assert [item.id for item in found.items] == [row.id for row in EXAMPLES]
    assert found.loss == measure(model).loss


def test_model_is_left_as_it_was_found(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    seen: list[tuple[bool, bool]] = []
    model.lm_head.register_forward_hook(lambda m, _, out: seen.append((m.training, out.requires_grad)))
    measure(model)
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == before
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()  # still trains


def test_progress_tells_every_batch_up_to_all_rows(model: LlamaForCausalLM) -> None:
    told: list[tuple[int, int]] = []
    held_out_loss(
        model, EXAMPLES, batch_size=8, pad_id=0, resamples=100, progress=lambda *now: told.append(now)
    )
    assert told == [(8, 17), (16, 17), (17, 17)]


def test_loss_that_is_not_finite_is_refused(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.lm_head.weight[EXAMPLES[2].input_ids[-1]] = math.nan
    with pytest.raises(EvaluateError, match="HB604") as caught:
        measure(model)
    assert "rows.jsonl:" in str(caught.value)


def test_rows_without_a_trained_token_are_all_named(model: LlamaForCausalLM) -> None:
    empty = [example("a", 5, 5), example("b", 6, 6)]
    with pytest.raises(EvaluateError, match="HB603") as caught:
        measure(model, [*EXAMPLES, *empty])
    assert "rows.jsonl:5" in str(caught.value)
    assert "rows.jsonl:6" in str(caught.value)


def test_no_rows_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(EvaluateError, match="HB603"):
        measure(model, [])


def test_real_model_has_its_published_loss_on_held_out_text(shared: Callable[[str], Path]) -> None:
    from halfbyte.data.read import read_rows
    from halfbyte.data.render import Renderer
    from halfbyte.data.tokenise import tokenise_rows
    from halfbyte.data.tokenizer import load_tokenizer, padding_id

    folder = shared("models/base-11m")
    tokenizer = load_tokenizer(folder)
    rows = read_rows([shared("datasets/base11m_heldout/heldout.jsonl")])[::16]
    examples = tokenise_rows(rows, Renderer(tokenizer), max_length=512).examples
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = held_out_loss(model, examples, batch_size=16, pad_id=padding_id(tokenizer))
    assert found.loss.low < 3.353 < found.loss.high  # its own measure, over all documents
    assert found.loss.high - found.loss.low < 1.0  # seven sources of text, from 2 to 5 nats per token
