"""What a weight error says about the loss of real models: how it grows within one, and nothing across models.

`halfbyte plan` predicts no loss from weights because of the second promise.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.short_runs import Shared
from transformers import AutoTokenizer

from halfbyte.kernels.ops import dequantize_4bit
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.quant.weight import QuantSpec

pytestmark = pytest.mark.slow

LENGTH, TOKENS = 256, 37_000
SPECS = [QuantSpec(scales=s, blocksize=b) for s in ("mse", "absmax") for b in (64, 256)]
# Within a model the loss per squared error varies by less than this factor over `SPECS`; between the models it
# differs by more than ten times as much.
WITHIN, BETWEEN = 1.5, 15.0


def texts(shared: Shared, model: str) -> list[str]:
    if model == "base-11m":
        lines = shared("datasets/base11m_heldout/heldout.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    return shared("datasets/tinystories/tinystories_77k.txt").read_text(encoding="utf-8").split("\n\n")


def rows(folder: Path, passages: list[str]) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [i for t in passages for i in begin + tokenizer(t, add_special_tokens=False)["input_ids"]]
    count = min(TOKENS, len(ids)) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


@torch.no_grad()
def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    total = 0.0
    for batch in ids.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1), reduction="sum"
        ).item()
    return total / (ids.shape[0] * (LENGTH - 1))


def held(layer: Linear4bit) -> torch.Tensor:
    return dequantize_4bit(layer.quantised_weight, torch.float32)


def loss_per_squared_error(shared: Shared, name: str) -> list[float]:
    folder = shared(f"models/{name}")
    ids = rows(folder, texts(shared, name))
    exact = load(folder, quantization=None, dtype=torch.float32)
    weights, before = dict(exact.named_parameters()), loss(exact, ids)
    found = []
    for spec in SPECS:
        model = load(folder, quantization=spec, dtype=torch.float32)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        lost = sum(
            float(((held(m) - weights[f"{n}.weight"].detach()).double() ** 2).sum())
            for n, m in layers.items()
        )
        energy = sum(float((weights[f"{n}.weight"].detach().double() ** 2).sum()) for n in layers)
        found.append((loss(model, ids) - before) / (lost / energy))
    return found


@pytest.mark.filterwarnings("ignore")
def test_loss_grows_with_the_squared_error_within_a_model_and_differs_across_models(shared: Shared) -> None:
    small, large = (loss_per_squared_error(shared, name) for name in ("stories260K-hf", "base-11m"))
    for found in (small, large):
        assert min(found) > 0
        assert max(found) / min(found) < WITHIN
    assert min(small) / max(large) > BETWEEN
