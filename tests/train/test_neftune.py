"""Promises of NEFTune: how large the noise is, what decides it, and that nothing but training has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from halfbyte.data.examples import Listed
from halfbyte.data.pack import Batch, collate, pack
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.evaluate.perplexity import held_out_loss
from halfbyte.settings import TrainConfig
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.neftune import embedding_noise, noise_of

WIDTH = 24
ALPHA = 5.0
# The largest of n uniform draws lies below 1 - t with probability (1 - t)^n: 3e-9 for 5 tokens of WIDTH and this t.
NEAR_THE_BOUND = 0.85


def test_each_packed_document_has_noise_of_its_own_length(rows: list[Example]) -> None:
    batch = pack(rows)
    noise = noise_of(batch, WIDTH, ALPHA, (0, 0, 0))
    for row, begin, end in batch.documents.tolist():
        bound = ALPHA / ((end - begin) * WIDTH) ** 0.5
        largest = noise[row, begin:end].abs().max().item()
        assert NEAR_THE_BOUND * bound < largest <= bound
        assert abs(noise[row, begin:end].mean().item()) < bound * 5 / (3 * (end - begin) * WIDTH) ** 0.5


def test_padding_has_none(rows: list[Example]) -> None:
    batch = collate(rows, pad_id=0)
    noise = noise_of(batch, WIDTH, ALPHA, (0, 0, 0))
    inside = torch.from_numpy(batch.attention_mask).bool()
    assert (noise[~inside] == 0).all()
    assert (noise[inside] != 0).float().mean() > 0.99


def test_one_document_has_the_noise_of_transformers(rows: list[Example]) -> None:
    batch = pack(rows[2:3])
    module = torch.nn.Embedding(4, WIDTH)
    module.neftune_noise_alpha = ALPHA
    zeros = torch.zeros(*batch.input_ids.shape, WIDTH)
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(module, (zeros,), zeros)
    ours = noise_of(batch, WIDTH, ALPHA, (0, 0, 0))
    # The standard deviation of n uniform draws is known to about a relative 0.45 / sqrt(n).
    assert abs(ours.std() / theirs.std() - 1) < 5 * 0.45 / zeros.numel() ** 0.5 * 2**0.5
    assert max(ours.abs().max(), theirs.abs().max()) <= ALPHA / zeros.numel() ** 0.5 * (1 + 2**-22)


def test_seed_step_and_pass_decide_the_noise(rows: list[Example]) -> None:
    batch = pack(rows)
    draws = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    noises = [noise_of(batch, WIDTH, ALPHA, draw) for draw in draws]
    assert torch.equal(noises[0], noise_of(batch, WIDTH, ALPHA, draws[0]))
    assert not any(torch.equal(noises[0], other) for other in noises[1:])


def test_the_noise_leaves_torchs_generator_alone(rows: list[Example]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    noise_of(pack(rows), WIDTH, ALPHA, (0, 0, 0))
    assert torch.equal(torch.rand(4), expected)


def test_the_model_hears_the_noise_within_the_block_only(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example]
) -> None:
    model, batch = tiny_llama(), pack(rows[:1])
    ids = torch.from_numpy(batch.input_ids)
    quiet = model(ids).logits
    with embedding_noise(model, ALPHA, batch, (0, 0, 0)):
        loud = model(ids).logits
    embedded = model.get_input_embeddings()(ids) + noise_of(batch, WIDTH, ALPHA, (0, 0, 0))
    assert torch.equal(loud, model(inputs_embeds=embedded).logits)
    assert (loud - quiet).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, quiet)
    with embedding_noise(model, None, batch, (0, 0, 0)):
        assert torch.equal(model(ids).logits, quiet)


def test_what_is_measured_within_the_block_has_none(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example]
) -> None:
    model, batch = tiny_llama(), pack(rows[:1])
    other = torch.from_numpy(pack(rows[1:2]).input_ids)
    quiet = model(other).logits
    with embedding_noise(model, ALPHA, batch, (0, 0, 0)):
        model(torch.from_numpy(batch.input_ids))
        with torch.no_grad():
            assert torch.equal(model(other).logits, quiet)
    refused = pytest.raises(TrainError, match="HB507")
    with refused, embedding_noise(model, ALPHA, batch, (0, 0, 0)), torch.no_grad():
        model(other)


def test_a_model_that_does_not_ask_its_embeddings_is_refused(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example]
) -> None:
    batch = pack(rows)
    with pytest.raises(TrainError, match="HB507"), embedding_noise(tiny_llama(), ALPHA, batch, (0, 0, 0)):
        pass


def losses(model: PreTrainedModel, rows: list[Example], folder: Path, **settings: object) -> list[float]:
    config = TrainConfig.model_validate({"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, **settings})
    done = train(model, Listed(rows), config, TrainRun(folder, save=lambda path: path.mkdir()))
    return [json.loads(line)["loss"] for line in done.metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("packing", [True, False])
def test_training_has_the_noise_and_evaluation_does_not(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example], tmp_path: Path, packing: bool
) -> None:
    model = tiny_llama()
    noisy = losses(model, rows, tmp_path / "a", neftune_alpha=ALPHA, packing=packing)
    assert noisy == losses(tiny_llama(), rows, tmp_path / "b", neftune_alpha=ALPHA, packing=packing)
    quiet = losses(tiny_llama(), rows, tmp_path / "c", packing=packing)
    assert abs(noisy[0] - quiet[0]) > 1e-4
    reference = tiny_llama()
    reference.load_state_dict(model.state_dict())
    measured, expected = (held_out_loss(m, rows, batch_size=4, pad_id=0) for m in (model, reference))
    assert measured == expected


def test_each_pass_of_a_run_draws_its_own_noise(
    tiny_llama: Callable[[], PreTrainedModel],
    rows: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws: list[tuple[int, ...]] = []

    def note(batch: Batch, width: int, alpha: float, draw: tuple[int, ...]) -> torch.Tensor:
        draws.append(draw)
        return noise_of(batch, width, alpha, draw)

    monkeypatch.setattr("halfbyte.train.neftune.noise_of", note)
    losses(tiny_llama(), rows, tmp_path, neftune_alpha=ALPHA, gradient_accumulation_steps=2, packing=False)
    assert draws == [(0, step, number) for step in range(3) for number in range(2)]
