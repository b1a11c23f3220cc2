"""Promises of the loss of classes: each row counts the same, however a step is cut and its rows are laid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.model.encoder_families import documents, save_encoder
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from halfbyte.data.encoder_texts import EncodedBatch, collate_encoded
from halfbyte.model.encoders import document_logits
from halfbyte.model.heads import Objective
from halfbyte.model.loading import load
from halfbyte.model.lora import add_lora, trainable_parameters
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.model.purpose import Head, Purpose, modules_to_train
from halfbyte.quant.weight import QuantSpec
from halfbyte.train.labelled import LabelLoss, TagLoss
from halfbyte.train.step import RowNames, StepLoss, accumulate

ROWS = documents(9, 1, 13, 4, 7)
LABELS = {row.id: number % 3 for number, row in enumerate(ROWS)}
LOSSES: dict[str, tuple[Purpose, StepLoss]] = {
    "labels": ("classify", LabelLoss(LABELS)),
    "smoothed labels": ("classify", LabelLoss(LABELS, Objective(label_smoothing=0.1, z_loss=1e-2))),
    "tags": ("tag", TagLoss()),
}
# Sums of float32 gradients in another order: rounding is of the order of 1e-6.
TOLERANCE = 1e-5


@pytest.fixture
def models(tmp_path: Path) -> dict[str, PreTrainedModel]:
    save_encoder("roberta", tmp_path)
    made = {}
    for purpose in ("classify", "tag"):
        head = Head(purpose, ("a", "b", "c"), seed=0)
        model = load(tmp_path, quantization=QuantSpec(), dtype=torch.float32, head=head)
        add_lora(model, LoraSpec(r=4, modules_to_save=modules_to_train(model)), seed=0)
        made[purpose] = model
    return made


def gradient(
    model: PreTrainedModel, loss: StepLoss, batches: list[EncodedBatch]
) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    divisor = loss.divisor(batches, RowNames())
    total = sum(accumulate(model, batch, divisor, RowNames(), loss).objective for batch in batches)
    gradients = [p.grad.clone() for p in trainable_parameters(model) if p.grad is not None]
    assert gradients
    return total, gradients


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_same_cut_packed_and_padded(models: dict[str, PreTrainedModel], name: str) -> None:
    purpose, loss = LOSSES[name]
    model = models[purpose]
    whole, expected = gradient(model, loss, [collate_encoded(ROWS, None)])
    for cut in (
        [collate_encoded(ROWS, 1)],
        [collate_encoded(ROWS[:1], None), collate_encoded(ROWS[1:], None)],
        [collate_encoded(ROWS[:3], 1), collate_encoded(ROWS[3:], None)],
    ):
        total, found = gradient(model, loss, cut)
        assert total == pytest.approx(whole, abs=TOLERANCE)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=TOLERANCE)


def test_the_loss_is_the_mean_over_rows(models: dict[str, PreTrainedModel]) -> None:
    batch = collate_encoded(ROWS, None)
    loss = LabelLoss(LABELS)
    found = loss.share(models["classify"], batch, loss.divisor([batch], RowNames()))
    logits = document_logits(models["classify"], batch)
    targets = torch.tensor([LABELS[row.id] for row in ROWS])
    assert torch.allclose(found.objective, F.cross_entropy(logits, targets))
    assert found.loss == pytest.approx(found.objective.item())
    smooth = LabelLoss(LABELS, Objective(0.1, 0.01)).share(models["classify"], batch, len(ROWS))
    expected = (
        F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.01 * logits.logsumexp(1).square().mean()
    )
    assert torch.allclose(smooth.objective, expected)
    assert smooth.loss == pytest.approx(found.loss)


def test_a_row_without_a_label_is_an_error(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(KeyError, match="row 4"):
        LabelLoss(dict.fromkeys(list(LABELS)[:-1], 0)).share(
            models["classify"], collate_encoded(ROWS, None), 5
        )
