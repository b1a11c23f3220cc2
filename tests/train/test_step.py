"""Promises of one step's loss: weighted by tokens over the step, the same as from all logits, loud."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from halfbyte.data.pack import Batch, collate, pack
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.model.loading import load
from halfbyte.train.step import RowNames, accumulate, batch_loss, trained_tokens

Build = Callable[[], PreTrainedModel]

# A gradient entry is a sum over the step's ~100 trained tokens of terms that each went through ~10 chained
# float32 products; another order of summation moves it by at most (100 + 10) half units in the last place
# (2^-24) of the sum of the terms' magnitudes, which is taken as 8 times the largest gradient entry.
FLOAT32_GRADIENT_TOLERANCE = 8 * 110 * 2.0**-24
# The same for a sum of ~100 losses of equal sign.
FLOAT32_LOSS_TOLERANCE = 110 * 2.0**-24

NAMES = RowNames()


def _cut(examples: list[Example], size: int) -> list[Batch]:
    return [collate(examples[i : i + size], pad_id=0) for i in range(0, len(examples), size)]


def _gradients(model: PreTrainedModel, micro: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    divisor = trained_tokens(micro, NAMES)
    loss = sum(accumulate(model, batch, divisor, NAMES).loss for batch in micro)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _largest_difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of all entries, relative to the largest expected one of its parameter."""
    assert got.keys() == expected.keys()
    assert got
    return max(float((got[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cutting_a_step_into_micro_batches_changes_nothing(
    tiny_llama: Build, rows: list[Example], size: int
) -> None:
    whole_loss, whole = _gradients(tiny_llama(), _cut(rows, 8))
    loss, parts = _gradients(tiny_llama(), _cut(rows, size))
    assert abs(loss - whole_loss) <= FLOAT32_LOSS_TOLERANCE * whole_loss
    assert _largest_difference(parts, whole) <= FLOAT32_GRADIENT_TOLERANCE


def test_the_mean_of_micro_batch_means_would_be_seen(tiny_llama: Build, rows: list[Example]) -> None:
    """The planted bug: each micro-batch divided by its own token count, as many loops do."""
    _, whole = _gradients(tiny_llama(), _cut(rows, 8))
    wrong = tiny_llama()
    for batch in _cut(rows, 1):
        accumulate(wrong, batch, 8 * batch.trained_tokens, NAMES)
    gradients = {name: p.grad for name, p in wrong.named_parameters() if p.grad is not None}
    assert _largest_difference(gradients, whole) > 100 * FLOAT32_GRADIENT_TOLERANCE


def _reference_loss_sum(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """All logits, shifted by one, summed over labels that are not -100."""
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
    ).logits
    labels = torch.from_numpy(batch.labels)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def _gemma2() -> PreTrainedModel:
    """A model that bends its logits after the head (soft cap): what happens there must not be skipped."""
    torch.manual_seed(5)
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


class _Headless(torch.nn.Module):
    """A model that does not tell its head, so that all its logits are computed."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, **inputs: object) -> object:
        return self.inner(**inputs)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "headless"])
def test_loss_and_gradient_equal_those_of_all_logits(
    tiny_llama: Build, rows: list[Example], kind: str
) -> None:
    build = {"llama": tiny_llama, "gemma2": _gemma2, "headless": lambda: _Headless(tiny_llama())}[kind]
    batch = collate(rows, pad_id=0)
    model, reference = build(), build()
    loss, expected = batch_loss(model, batch, 1).objective, _reference_loss_sum(reference, batch)
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= FLOAT32_LOSS_TOLERANCE * expected.item()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert (
        _largest_difference(got, {n: p.grad for n, p in reference.named_parameters() if p.grad is not None})
        <= FLOAT32_GRADIENT_TOLERANCE
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_neither_loss_nor_gradient(
    tiny_llama: Build, rows: list[Example], attention: str
) -> None:
    packed, padded = tiny_llama(), tiny_llama()
    for model in (packed, padded):
        model.set_attn_implementation(attention)
    loss, gradients = _gradients(packed, [pack(rows[:3]), pack(rows[3:])])
    expected_loss, expected = _gradients(padded, [collate(rows, pad_id=0)])
    assert abs(loss - expected_loss) <= FLOAT32_LOSS_TOLERANCE * expected_loss
    assert _largest_difference(gradients, expected) <= FLOAT32_GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", ["base-11m", "stories260K-hf", "capp-gpt-hf"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_nothing_on_real_models(
    shared: Callable[[str], Path], name: str, attention: str
) -> None:
    """Two rotary models with grouped heads, and GPT-2 with learned positions; 7 rows of 1 to 64 tokens."""
    random = np.random.default_rng(0)

    def gradients(batch_of: Callable[[list[Example]], Batch]) -> tuple[float, dict[str, torch.Tensor]]:
        model = load(shared(f"models/{name}"), quantization=None, dtype=torch.float32)
        model.set_attn_implementation(attention)
        return _gradients(model, [batch_of(examples)])

    vocabulary = {"base-11m": 4096, "stories260K-hf": 512, "capp-gpt-hf": 53}[name]
    examples = [
        Example(
            input_ids=random.integers(0, vocabulary, length).astype(np.int32),
            trained=np.arange(length) >= length // 3,
            prompt_ids=None,
            answer=None,
            id=f"{length:016x}",
            where=f"rows.jsonl:{length}",
            truncated=False,
        )
        for length in (5, 1, 33, 17, 64, 2, 21)
    ]
    loss, packed = gradients(pack)
    expected_loss, padded = gradients(lambda rows: collate(rows, pad_id=0))
    assert abs(loss - expected_loss) <= FLOAT32_LOSS_TOLERANCE * expected_loss
    # Up to 6 layers of 7 chained products each instead of 10 in all: 42 + 100 half units, with the factor from above.
    assert _largest_difference(packed, padded) <= 8 * 142 * 2.0**-24


@pytest.mark.parametrize(
    "leak", ["positions that go on", "labels that cross", "attention to all that came before"]
)
def test_rows_that_leak_into_each_other_would_be_seen(
    tiny_llama: Build, rows: list[Example], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    """The planted bugs: what packing without isolation does, in each of its ways."""
    _, expected = _gradients(tiny_llama(), [collate(rows, pad_id=0)])
    batch = pack(rows)
    if leak == "attention to all that came before":
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    elif leak == "positions that go on":
        through = np.arange(batch.input_ids.size)[None]
        monkeypatch.setattr(Batch, "position_ids", property(lambda self: through))
    else:
        np.copyto(batch.labels, np.concatenate([np.where(e.trained, e.input_ids, -100) for e in rows])[None])
        batch.labels[0, batch.cu_seqlens[1:-1]] = batch.input_ids[0, batch.cu_seqlens[1:-1]]
    _, leaking = _gradients(tiny_llama(), [batch])
    assert _largest_difference(leaking, expected) > 100 * FLOAT32_GRADIENT_TOLERANCE


def test_padding_does_not_change_the_loss(tiny_llama: Build, rows: list[Example]) -> None:
    model = tiny_llama()
    with torch.no_grad():
        alone = sum(batch_loss(model, collate([row], pad_id=0), 1).objective.item() for row in rows)
        for pad_id in (0, 7):
            padded = batch_loss(model, collate(rows, pad_id=pad_id), 1).objective.item()
            assert abs(padded - alone) <= FLOAT32_LOSS_TOLERANCE * alone


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_any_gradient(
    tiny_llama: Build, rows: list[Example], poison: float
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 2] = poison
    batch = collate(rows[:2], pad_id=0)
    with pytest.raises(TrainError, match=r"HB501") as caught:
        accumulate(model, batch, 8, RowNames([rows[1]]))
    assert rows[0].id in caught.value.where
    assert f"{rows[1].id} (rows.jsonl:2)" in caught.value.where
    assert all(p.grad is None for p in model.parameters())


def test_a_step_without_trained_tokens_is_refused(rows: list[Example]) -> None:
    rows[0].trained[:] = False
    with pytest.raises(TrainError, match=r"HB504"):
        trained_tokens([collate(rows[:1], pad_id=0)], NAMES)


def test_long_lists_of_rows_are_shortened(rows: list[Example]) -> None:
    batch = collate(rows, pad_id=0)
    assert NAMES.of([batch, batch]).endswith(" and 8 more")
