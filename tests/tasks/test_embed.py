"""Promises of embedding: vectors as sentence-transformers makes them, exact losses and ranks, a run that learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.model.encoder_families import documents, save_encoder
from torch import Tensor
from torch.nn import functional as F

from halfbyte.data.encoder_texts import collate_encoded
from halfbyte.data.read import read_rows
from halfbyte.errors import DataError, EvaluateError, ModelError
from halfbyte.evaluate.retrieval import Pairs, measured_partners, measured_scores, spearman
from halfbyte.model.loading import load
from halfbyte.model.pooling import Pooling, document_vectors, pooling_of
from halfbyte.model.purpose import Head
from halfbyte.pipeline import evaluate, run
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare
from halfbyte.train.alike import TEMPERATURE, CosineLoss, PartnerLoss
from halfbyte.train.step import RowNames

Make = Callable[..., Config]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def rows(negative: bool = False) -> str:
    """Codes that no model knows, with the number each stands for."""
    found: list[dict[str, Any]] = []
    for at, number in enumerate(NUMBERS):
        for way in ("code {}", "what is {}", "{} please", "tell me of {}"):
            row = {"anchor": way.format(f"zq{'abcdefghijkl'[at] * 3}"), "positive": f"the number {number}"}
            found.append(row | ({"negative": f"the number {NUMBERS[at - 1]}"} if negative else {}))
    return "\n".join(map(json.dumps, found)) + "\n"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("packed", [False, True])
def test_vectors_are_pooled_over_each_document(tmp_path: Path, pooling: Pooling, packed: bool) -> None:
    stored = save_encoder("bert", tmp_path)
    model = load(tmp_path, quantization=None, dtype=torch.float32, head=Head("embed"))
    texts = documents(7, 1, 12)
    with torch.no_grad():
        found = document_vectors(model, collate_encoded(texts, None if packed else 0), pooling)
        for text, vector in zip(texts, found, strict=True):
            states = stored(input_ids=torch.from_numpy(text.input_ids).long()[None])[0][0]
            expected = states.mean(0) if pooling == "mean" else states[0]
            assert torch.allclose(vector, F.normalize(expected, dim=0), atol=1e-5)


def test_pooling_is_as_the_folder_says(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "mean"
    file = tmp_path / "1_Pooling" / "config.json"
    file.parent.mkdir()
    for mode, expected in (("cls_token", "cls"), ("mean_tokens", "mean")):
        file.write_text(json.dumps({"word_embedding_dimension": 8, f"pooling_mode_{mode}": True}))
        assert pooling_of(tmp_path) == expected
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match=r"HB353.*pooling_mode_max_tokens"):
        pooling_of(tmp_path)


def vectors(n: int) -> tuple[Any, Tensor]:
    """A batch of n documents, and vectors for them."""
    torch.manual_seed(0)
    made = F.normalize(torch.randn(n, 5), dim=1).requires_grad_(True)
    return collate_encoded(documents(*[3] * n), 0), made


@pytest.mark.parametrize("members", [2, 3])
def test_the_partner_is_found_among_all_others(members: int) -> None:
    batch, made = vectors(4 * members)
    loss = PartnerLoss(lambda *_: made, members)
    assert loss.divisor([batch], RowNames()) == 4
    others = torch.cat([made[k::members] for k in range(1, members)])
    expected = F.cross_entropy(made[0::members] @ others.T / TEMPERATURE, torch.arange(4))
    assert torch.allclose(loss.share(torch.nn.Module(), batch, 4).objective, expected)  # type: ignore[arg-type]


def test_a_text_equal_to_the_partner_is_no_negative() -> None:
    batch, made = vectors(6)
    same = batch.__class__(batch.input_ids, batch.labels, batch.documents, ("a", "p", "b", "p", "c", "a"))
    found = PartnerLoss(lambda *_: made).share(torch.nn.Module(), same, 1).objective  # type: ignore[arg-type]
    scores = (made[0::2] @ made[1::2].T / TEMPERATURE).exp()
    kept = torch.tensor(
        [[1, 0, 0], [0, 1, 1], [1, 1, 1]]
    )  # p is the partner of a and b; a is an anchor of its own
    assert torch.allclose(found, -(scores.diagonal() / (scores * kept).sum(1)).log().sum())


def test_cosines_are_brought_to_their_scores() -> None:
    batch, made = vectors(4)
    names = batch.ids
    loss = CosineLoss(lambda *_: made, {(names[0], names[1]): 0.5, (names[2], names[3]): -1.0})
    cosines = (made[0::2] * made[1::2]).sum(1)
    expected = (cosines - torch.tensor([0.5, -1.0])).square().mean()
    found = loss.share(torch.nn.Module(), batch, loss.divisor([batch], RowNames()))  # type: ignore[arg-type]
    assert torch.allclose(found.objective, expected)


def test_ranks_count_the_worst_of_equals() -> None:
    first, second = np.eye(3), np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0.6, 0.8]])
    found = measured_partners(Pairs(["a", "b", "c"], ["r:1", "r:2", "r:3"], first, second, ["x", "y", "z"]))
    assert [item.rank for item in found.records["pairs"]] == [2, 3, 1]  # type: ignore[attr-defined]
    values = {m.name: m.interval.value for m in found.metrics}
    assert values["recall_at_1"] == pytest.approx(1 / 3)
    assert values["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    alike = measured_partners(Pairs(["a", "b"], ["r:1", "r:2"], first[:2], second[:2], ["x", "x"]))
    assert [item.candidates for item in alike.records["pairs"]] == [1, 1]  # type: ignore[attr-defined]
    with pytest.raises(EvaluateError, match=r"HB611[\s\S]*r:1 is the first"):
        measured_partners(Pairs(["a"], ["r:1"], first[:1] * np.nan, second[:1], ["x"]))


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 1e9])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 over the root of 4.5 * 5.
    assert spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(
        4.5 / math.sqrt(22.5)
    )
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_correlations_are_compared_pair_by_pair() -> None:
    random = np.random.default_rng(0)
    scores = random.random(80)
    angles = np.stack([np.arccos(scores), np.arccos(random.random(80))])
    sides = [np.stack([np.cos(a), np.sin(a)], axis=1) for a in angles]
    ids = [f"{n}" for n in range(80)]
    right, chance = (
        measured_scores(Pairs(ids, ids, np.tile([1.0, 0.0], (80, 1)), side, ids), scores.tolist())
        for side in sides
    )
    assert right.metrics[0].interval.value == pytest.approx(1.0)
    gain = chance.metrics[0].difference(right.metrics[0], resamples=300, seed=0)
    assert 0.5 < gain.low <= gain.value
    assert chance.metrics[0].interval.low < 0 < chance.metrics[0].interval.high


@pytest.mark.parametrize("negative", [False, True])
def test_a_run_learns_which_texts_are_alike(make: Make, negative: bool) -> None:
    config = make("embed", rows(negative))
    result = run(config)
    metrics = json.loads((result.folder / "summary.json").read_text())["metrics"]
    assert metrics["mrr"]["after"]["value"] > metrics["mrr"]["before"]["value"] + 0.1
    alone = make("embed", rows(negative), held_out="\n".join(rows(negative).splitlines()[:8]))
    assert {m.name for m in evaluate(alone, result.result).metrics} == {"recall_at_1", "mrr"}


def test_a_run_learns_scores(make: Make) -> None:
    found = [
        {
            "text": f"zq{'abcd'[a] * 2} here",
            "text_pair": f"yx{'abcd'[b] * 2} there {way}",
            "score": float(b == (a + 1) % 4),
        }
        for a in range(4)
        for b in range(4)
        for way in ("now", "then", "soon", "late")
    ]
    result = run(
        make(
            "embed",
            "\n".join(map(json.dumps, found)),
            "train.eval_steps=6",
            "train.keep=best",
            "train.epochs=6",
        )
    )
    metrics = json.loads((result.folder / "summary.json").read_text())["metrics"]
    assert metrics["spearman"]["after"]["value"] > metrics["spearman"]["before"]["value"]


def test_rows_of_several_kinds_and_unreachable_scores_are_refused(make: Make, tmp_path: Path) -> None:
    pairs = [{"text": f"a{n}", "text_pair": "b", "score": 4.5} for n in range(4)]
    config = make("embed", "\n".join(map(json.dumps, pairs)))
    with pytest.raises(DataError, match="HB234.*4 of 4 rows have a score outside"):
        prepare(config)
    with pytest.raises(DataError, match="HB234.*rows of 2 kinds"):
        prepare(make("embed", rows() + rows(negative=True)))
    file = tmp_path / "scored.jsonl"
    file.write_text(json.dumps({"text": "a", "text_pair": "b", "score": "much"}) + "\n")
    with pytest.raises(DataError, match="expected a number"):
        read_rows([str(file)], "auto")
