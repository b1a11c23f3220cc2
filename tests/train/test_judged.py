"""Promises of training on judged answers: log-probabilities are the model's own, better answers become likelier."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.pack import Batch, collate, pack
from halfbyte.data.tokenise import Example
from halfbyte.model.lora import LoraSpec, add_lora
from halfbyte.settings import TrainConfig
from halfbyte.train.judged import PairLoss, SingleLoss, answer_logps, reference_logps
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.preference import PAIRWISE, Answers, PreferenceSpec
from halfbyte.train.step import RowNames, accumulate

Build = Callable[[], PreTrainedModel]
SPEC = PreferenceSpec(beta=0.5)
NAMES = RowNames()


@pytest.fixture
def pairs(rows: list[Example]) -> list[Example]:
    """Eight pairs: each row, and the same prompt with another answer of another length."""
    random = np.random.default_rng(3)
    found = []
    for number, row in enumerate(rows):
        begin = int(row.trained.argmax())
        answer = random.integers(0, 50, 1 + number % 4).astype(np.int32)
        ids = np.concatenate([row.input_ids[:begin], answer])
        worse = replace(row, input_ids=ids, trained=np.arange(len(ids)) >= begin, id=f"{row.id}/rejected")
        found += [row, worse]
    return found


def exact(model: PreTrainedModel, example: Example) -> torch.Tensor:
    """Log-probability of an example's answer from all logits of the row alone."""
    ids = torch.from_numpy(example.input_ids).long()
    logp = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), dim=-1)
    at = torch.from_numpy(example.trained[1:]).nonzero()[:, 0]
    return logp[at, ids[at + 1]].sum()


@pytest.mark.parametrize("lay_out", [pack, lambda e: collate(e, 0)], ids=["packed", "padded"])
def test_log_probabilities_of_answers_are_those_of_the_rows_alone(
    tiny_llama: Build, pairs: list[Example], lay_out: Callable[[list[Example]], Batch]
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        logp, tokens = answer_logps(model, lay_out(pairs))
        expected = torch.stack([exact(model, example) for example in pairs])
    assert tokens.tolist() == [int(e.trained[1:].sum()) for e in pairs]
    assert (logp - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("objective", PAIRWISE)
def test_loss_and_gradient_are_those_of_all_logits_however_the_step_is_cut(
    tiny_llama: Build, pairs: list[Example], objective: str
) -> None:
    def gradient(model: PreTrainedModel) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    reference = {e.id: -0.3 * len(e.input_ids) for e in pairs}
    loss = PairLoss(SPEC, reference, objective)
    naive = tiny_llama()
    logp = torch.stack([exact(naive, example) for example in pairs])
    tokens = torch.tensor([float(e.trained[1:].sum()) for e in pairs], dtype=torch.float64)
    ref = torch.tensor([reference[e.id] for e in pairs], dtype=torch.float64)
    sides = [tuple(x[k::2] for x in (logp, tokens, ref)) for k in (0, 1)]
    expected = PAIRWISE[objective](Answers(*sides[0]), Answers(*sides[1]), SPEC).loss.mean()
    expected.backward()
    for cut in (2, 4, 16):
        model = tiny_llama()
        batches = [pack(pairs[begin : begin + cut]) for begin in range(0, 16, cut)]
        divisor = loss.divisor(batches, NAMES)
        assert divisor == 8
        shares = [accumulate(model, batch, divisor, NAMES, loss) for batch in batches]
        assert sum(share.objective for share in shares) == pytest.approx(expected.item(), rel=1e-5)
        assert (gradient(model) - gradient(naive)).abs().max() <= 2e-5 * gradient(naive).abs().max()


def test_an_untrained_adapter_is_its_own_reference(tiny_llama: Build, pairs: list[Example]) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4), seed=1)
    batch = pack(pairs)
    loss = PairLoss(SPEC, reference_logps(model, [batch]), "dpo")
    found = accumulate(model, batch, 8, NAMES, loss)
    assert found.loss == pytest.approx(np.log(2), abs=1e-6)
    assert found.rewards is not None
    assert found.rewards.better == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("objective", PAIRWISE)
def test_training_makes_the_better_answers_win(
    tiny_llama: Build, pairs: list[Example], tmp_path: Path, objective: str
) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=8), seed=1)
    loss = PairLoss(SPEC, reference_logps(model, [pack(pairs)]), objective)
    config = TrainConfig(batch_tokens=160, max_steps=60, learning_rate=1e-2, schedule="constant")
    train(model, Listed(pairs), config, TrainRun(tmp_path, lambda _: None, loss=loss))
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[-1]["reward_accuracy"] == 1.0
    assert lines[-1]["reward_better"] - lines[-1]["reward_worse"] > 0.3
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert all(line["documents"] % 2 == 0 for line in lines)


@pytest.mark.parametrize("lay_out", [pack, lambda e: collate(e, 0)], ids=["packed", "padded"])
def test_some_documents_of_a_batch_are_the_batch_of_them_alone(
    pairs: list[Example], lay_out: Callable[[list[Example]], Batch]
) -> None:
    for first in (0, 1):
        some, alone = lay_out(pairs).only(first, 2), lay_out(pairs[first::2])
        width = alone.input_ids.shape[1]
        assert np.array_equal(some.input_ids[:, :width], alone.input_ids)
        assert np.array_equal(some.labels[:, :width], alone.labels)
        assert np.array_equal(some.documents, alone.documents)
        assert some.ids == alone.ids


def test_kto_makes_good_answers_likelier_and_bad_ones_less(
    tiny_llama: Build, pairs: list[Example], tmp_path: Path
) -> None:
    # every second answer is bad; each is followed by another row's, with an id of its own
    units = []
    for number, answer in enumerate(pairs):
        other = pairs[(number + 5) % len(pairs)]
        units += [answer, replace(other, id=f"{answer.id}/other")]
    model = tiny_llama()
    add_lora(model, LoraSpec(r=8), seed=1)
    good = {example.id: not example.id.endswith("rejected") for example in pairs}
    loss = SingleLoss(SPEC, reference_logps(model, [pack(units)]), good)
    config = TrainConfig(batch_tokens=400, max_steps=60, learning_rate=1e-2, schedule="constant")
    train(model, Listed(units), config, TrainRun(tmp_path, lambda _: None, loss=loss))
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6)  # 1 - sigmoid(0)
    assert lines[-1]["loss"] < 0.3
    assert lines[-1]["reward_accuracy"] >= 0.9
    assert lines[-1]["reward_better"] > 0 > lines[-1]["reward_worse"]


def test_kto_is_its_formula_with_the_gradient_of_the_answers_alone(
    tiny_llama: Build, pairs: list[Example]
) -> None:
    reference = {
        e.id: -0.3 * len(e.input_ids) - 40.0 for e in pairs
    }  # far off, so that the model has strayed
    good = {e.id: number % 4 == 0 for number, e in enumerate(pairs)}
    naive, model = tiny_llama(), tiny_llama()
    logp = torch.stack([exact(naive, example) for example in pairs])
    ratio = logp - torch.tensor([reference[e.id] for e in pairs], dtype=torch.float64)
    strayed = ratio[1::2].mean().item()
    assert strayed > 0
    signs = torch.tensor([1.0 if good[e.id] else -1.0 for e in pairs[::2]])
    expected = (1 - torch.sigmoid(SPEC.beta * signs * (ratio[::2] - strayed))).mean()
    expected.backward()
    found = accumulate(model, pack(pairs), 8, NAMES, SingleLoss(SPEC, reference, good))
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    got, wanted = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, naive)
    )
    assert wanted.abs().max() > 1e-3
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_comparison_with_nothing_is_an_error(tiny_llama: Build, pairs: list[Example]) -> None:
    batch = pack(pairs)
    with pytest.raises(KeyError):
        accumulate(tiny_llama(), batch, 8, NAMES, PairLoss(SPEC, {}, "dpo"))
    accumulate(tiny_llama(), batch, 8, NAMES, PairLoss(SPEC, {}, "simpo"))
