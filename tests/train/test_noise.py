"""Promises of the noise measurement: right where the noise scale is known, for any cut, and without a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.order import Position, steps
from halfbyte.data.pack import collate
from halfbyte.data.tokenise import Example
from halfbyte.evaluate.statistics import ratio_of_means
from halfbyte.settings import TrainConfig
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.noise import NoiseMeter
from halfbyte.train.plan import Plan
from halfbyte.train.step import batch_loss

PADDED = TrainConfig(packing=False, batch_size=2, gradient_accumulation_steps=2, epochs=1, learning_rate=1e-3)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7, 2, 6), (5, 3, 8)])
def test_a_known_noise_scale_is_found_however_a_step_is_cut(sizes: tuple[int, ...]) -> None:
    """Normal rows in 30 dimensions and half the squared distance as loss: noise and signal are known."""
    generator = torch.Generator().manual_seed(0)
    dimensions, spread, rows = 30, 1.5, sum(sizes)
    true = torch.full((dimensions,), 0.4)
    variance, signal = dimensions * spread**2 / rows, float(true.square().sum())
    parts = [torch.nn.Parameter(torch.zeros(20)), torch.nn.Parameter(torch.zeros(10))]
    found = []
    with NoiseMeter(parts, len(sizes)) as meter:
        for _ in range(2000):
            meter.begin()
            for size in sizes:
                x = true + spread * torch.randn(size, dimensions, generator=generator)
                (0.5 * (torch.cat(parts) - x).square().sum() / rows).backward()  # type: ignore[no-untyped-call]
                meter.passed(size / rows)
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parts if p.grad is not None))
            noise = meter.of_step(norm)
            assert noise is not None
            found.append(noise)
            for p in parts:
                p.grad = None
    mean = [sum(column) / len(found) for column in zip(*found, strict=True)]
    assert mean[0] == pytest.approx(variance, rel=0.05)  # of 2000 steps: spread of about 1 %
    assert mean[1] == pytest.approx(signal, rel=0.1)
    interval = ratio_of_means(*zip(*found[:400], strict=True))
    assert interval.low < variance / signal < interval.high
    assert interval.high / interval.low < 1.6


def test_a_run_writes_down_what_its_micro_batches_show(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example], tmp_path: Path
) -> None:
    """The first step, held against the gradients of its micro-batches one by one."""
    model, run = tiny_llama(), TrainRun(tmp_path, lambda _: None)
    plan = Plan.of([len(row.input_ids) for row in rows], PADDED, run.seed)
    passes, _ = next(steps(plan.order, 2, Position()))
    batches = [collate([rows[unit] for unit in units], pad_id=0) for units in passes]
    whole = sum(batch.trained_tokens for batch in batches)
    gradients, weights = [], []
    for batch in batches:
        model.zero_grad()
        batch_loss(model, batch, batch.trained_tokens).objective.backward()  # type: ignore[no-untyped-call]
        gradients.append(
            torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
        )
        weights.append(batch.trained_tokens / whole)
    assert weights[0] != weights[1]
    together = sum(w * g for w, g in zip(weights, gradients, strict=True))
    apart = sum(w * float(g.square().sum()) for w, g in zip(weights, gradients, strict=True))
    norm = float(torch.as_tensor(together).square().sum())
    model = tiny_llama()
    train(model, Listed(rows), PADDED, run)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["grad_variance"] == pytest.approx(apart - norm, rel=1e-4)
    assert first["grad_signal"] == pytest.approx(2 * norm - apart, rel=1e-4)
    assert not any(p._backward_hooks for p in model.parameters())


def test_nothing_is_measured_of_single_micro_batches(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example], tmp_path: Path
) -> None:
    config = PADDED.model_copy(update={"gradient_accumulation_steps": 1})
    train(tiny_llama(), Listed(rows), config, TrainRun(tmp_path, lambda _: None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {(line["grad_variance"], line["grad_signal"]) for line in lines} == {(None, None)}
    three = PADDED.model_copy(
        update={"gradient_accumulation_steps": 3}
    )  # 4 passes an epoch: the last step has one
    train(tiny_llama(), Listed(rows), three, TrainRun(tmp_path, lambda _: None))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_variance"] is None for line in lines] == [False, True]


def test_a_micro_batch_without_trained_tokens_adds_nothing(
    tiny_llama: Callable[[], PreTrainedModel], rows: list[Example], tmp_path: Path
) -> None:
    for row in rows[::2]:
        row.trained[:] = False
    config = PADDED.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 8})
    train(tiny_llama(), Listed(rows), config, TrainRun(tmp_path, lambda _: None))
    [line] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(line["grad_variance"])
    assert line["grad_variance"] > 0
