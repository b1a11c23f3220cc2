"""Promises of the training loop: deterministic, recorded, stoppable, and loud at the first bad number."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.order import Position, order_of, passes_in, steps
from halfbyte.data.pack import collate, pack
from halfbyte.data.tokenise import Example
from halfbyte.errors import ConfigError, DataError, ModelError, TrainError
from halfbyte.settings import TrainConfig
from halfbyte.train.checkpoint import STATE_FILE
from halfbyte.train.display import Silent
from halfbyte.train.interrupt import TrainInterrupted
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.metrics import StepRecord
from halfbyte.train.plan import Plan
from halfbyte.train.step import batch_loss

Build = Callable[[], PreTrainedModel]
PADDED = TrainConfig(packing=False, batch_size=2, gradient_accumulation_steps=3, epochs=3, learning_rate=1e-2)
# 136 tokens in rows of up to 33: 4 passes of 40 at most an epoch, 2 of which make a step
PACKED = TrainConfig(batch_tokens=40, gradient_accumulation_steps=2, epochs=3, learning_rate=1e-2)


@pytest.fixture(params=[PACKED, PADDED], ids=["packed", "padded"])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    """Either way of laying out rows: 2 steps an epoch, 6 in all."""
    assert isinstance(request.param, TrainConfig)
    return request.param


def _run(model: PreTrainedModel, folder: Path, seed: int = 0, display: Silent | None = None) -> TrainRun:
    def save(target: Path) -> None:
        save_file(
            {name: p.detach().clone() for name, p in model.named_parameters()}, target / "weights.safetensors"
        )

    return TrainRun(folder, save, seed=seed, display=display or Silent())


def _weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_training_lowers_the_loss_and_records_every_step(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama().eval()
    result = train(model, Listed(rows), config, _run(model, tmp_path))
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # padded, 8 rows in passes of 2, 3 of which make a step: the second step of an epoch has 1 pass; packed: 2 and 2
    half = 0.5 if config.packing else 0.75
    assert [line["epoch"] for line in lines] == [half, 1.0, 1 + half, 2.0, 2 + half, 3.0]
    assert [line["documents"] for line in lines] == [8 * half, 8 - 8 * half] * 3
    assert result.last_loss < 0.8 * result.first_loss
    assert (result.first_loss, result.last_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert (
        result.tokens == 3 * sum(len(row.input_ids) for row in rows) == sum(line["tokens"] for line in lines)
    )
    assert result.trained_tokens == 3 * sum(row.trained_tokens for row in rows)
    assert (result.usage.passes, result.usage.rows_per_pass) == (12, 2.0)
    if config.packing:
        assert result.usage.batch_tokens == 40
        assert result.usage.fill == 136 / 160
        assert sorted({line["fill"] * 80 for line in lines if line["epoch"] <= 1}) == pytest.approx(
            sorted({line["tokens"] for line in lines if line["epoch"] <= 1})
        )
    else:
        assert result.usage.batch_tokens is None
        assert result.usage.fill < 1.0
    assert result.tokens == pytest.approx(
        sum(line["tokens"] / line["fill"] for line in lines) * result.usage.fill
    )
    assert [line["lr"] for line in lines[:2]] == [5e-3, 1e-2]  # 1 warm-up step of 6
    for line in lines:
        assert min(line["grad_norm"], line["tokens_per_s"], line["seconds"]) > 0
    assert not model.training


def test_the_same_seed_gives_the_same_weights_bit_by_bit(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    def trained(seed: int, name: str) -> torch.Tensor:
        model = tiny_llama()
        torch.rand(ord(name))  # whatever torch's generator did before does not matter
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        train(model, Listed(rows), config, _run(model, tmp_path / name, seed))
        return _weights(model)

    first = trained(3, "a")
    assert torch.equal(first, trained(3, "b"))
    assert not torch.equal(first, trained(4, "c"))


def test_every_step_is_adamw_on_its_own_gradient_at_its_own_rate(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    """Against the loop written out plainly, one pass a step."""
    config = config.model_copy(
        update={
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "warmup_ratio": 0.5,
            "max_grad_norm": None,
        }
    )
    model, plain = tiny_llama(), tiny_llama()
    train(model, Listed(rows), config, _run(model, tmp_path))
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0, fused=True)
    order = order_of([len(row.input_ids) for row in rows], config, 0)
    for ([members], _), factor in zip(steps(order, 1), (1 / 3, 2 / 3, 1.0, 0.5), strict=False):
        chosen = [rows[i] for i in members]
        batch = pack(chosen) if config.packing else collate(chosen, 0)
        batch_loss(plain, batch, batch.trained_tokens).objective.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(_weights(model), _weights(plain))


@pytest.mark.parametrize("change", [{"label_smoothing": 0.2}, {"z_loss": 0.01}], ids=str)
def test_another_objective_is_minimised_but_the_loss_reported_stays_plain(
    change: dict[str, float], tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    """The first step's loss is before any update, so the same whatever is minimised; the weights after it are not."""
    config = config.model_copy(update={"max_steps": 3})
    plain, other = tiny_llama(), tiny_llama()
    train(plain, Listed(rows), config, _run(plain, tmp_path / "plain"))
    train(other, Listed(rows), config.model_copy(update=change), _run(other, tmp_path / "other"))
    expected, found = _lines(tmp_path / "plain"), _lines(tmp_path / "other")
    assert found[0]["loss"] == expected[0]["loss"]
    assert found[2]["loss"] != expected[2]["loss"]
    assert all(line["objective"] not in (None, line["loss"]) for line in found)
    assert [line["objective"] for line in expected] == [None] * 3
    assert not torch.equal(_weights(plain), _weights(other))


def test_max_steps_decides_over_epochs(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()
    five = config.model_copy(update={"max_steps": 5, "epochs": 1})
    assert train(model, Listed(rows), five, _run(model, tmp_path)).steps == 5


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "epochs", "expected"),
    [
        (8, 2, 3, 1, 2),
        (8, 8, 1, 1, 1),
        (9, 8, 1, 2, 4),
        (10, 1, 4, 0.5, 2),
        (1, 8, 8, 0.1, 1),
        (10, 1, 1, 2.1, 21),
    ],
)
def test_the_plan_counts_optimizer_steps(
    rows: int, batch: int, accumulate: int, epochs: float, expected: int
) -> None:
    """Rows of equal length come `batch_size` at a time, packed or not."""
    for packing in (True, False):
        config = TrainConfig(
            packing=packing, batch_size=batch, gradient_accumulation_steps=accumulate, epochs=epochs
        )
        assert Plan.of([7] * rows, config, seed=0).total_steps == expected


def test_the_plan_counts_the_passes_of_every_epoch(rows: list[Example]) -> None:
    """How many passes packed rows take depends on the shuffling, so each epoch is counted."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 20, 2000).tolist()
    config = TrainConfig(batch_tokens=23, epochs=2.5)
    order = Plan.of(lengths, config, seed=0).order
    first, second, third = (passes_in(order, epoch) for epoch in range(3))
    assert len({first, second, third}) > 1
    assert Plan.of(lengths, config, seed=0).total_steps == first + second + math.ceil(third / 2)


# With eps this large AdamW's step is the averaged gradient times the rate, a smooth function of it, so a relative
# error of the gradients moves the loss by at most that share of all that training moves it, once for every step.
SMOOTH = {"eps": 1.0, "learning_rate": 0.3, "max_grad_norm": None, "epochs": 6, "schedule": "constant"}
# As in test_step.py: sums of ~100 terms through ~10 chained float32 products, in another order.
FLOAT32_GRADIENT_TOLERANCE = 8 * 110 * 2.0**-24
FLOAT32_LOSS_TOLERANCE = 110 * 2.0**-24


def _padded_losses(model: PreTrainedModel, rows: list[Example], config: TrainConfig) -> list[float]:
    """Losses of the plain loop over the very rows of each packed step, padded."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, eps=1.0, weight_decay=0.0)
    plan = Plan.of([len(row.input_ids) for row in rows], config, seed=0)
    losses = []
    factors = [(step + 1) / (plan.warmup + 1) for step in range(plan.warmup)]
    for step, (passes, _) in enumerate(itertools.islice(steps(plan.order, 2), plan.total_steps)):
        batch = collate([rows[i] for members in passes for i in members], 0)
        loss = batch_loss(model, batch, batch.trained_tokens).objective
        loss.backward()
        losses.append(loss.item())
        optimizer.param_groups[0]["lr"] = config.learning_rate * (
            factors[step] if step < plan.warmup else 1.0
        )
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("leaking", [False, True])
def test_packed_training_is_padded_training(
    tiny_llama: Build,
    rows: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leaking: bool,
) -> None:
    """The same rows in each step give the same losses; a planted leak that the proof is kept from seeing does not."""
    config = PACKED.model_copy(update=SMOOTH)
    expected = _padded_losses(tiny_llama(), rows, config)
    if leaking:
        monkeypatch.setattr("halfbyte.train.loop.prove_isolation", lambda model: None)
        monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    model = tiny_llama()
    train(model, Listed(rows), config, _run(model, tmp_path))
    found = [line["loss"] for line in _lines(tmp_path)]
    assert len(found) == len(expected) == 12
    moved = max(expected) - min(expected)
    assert moved > 0.1 * expected[0]
    off = [
        abs(one - other) / (FLOAT32_LOSS_TOLERANCE * other + FLOAT32_GRADIENT_TOLERANCE * moved * (step + 1))
        for step, (one, other) in enumerate(zip(found, expected, strict=True))
    ]
    assert (max(off) <= 1.0) is not leaking
    assert max(off) < 1.0 or max(off) > 100.0


def test_rows_that_would_see_each_other_stop_the_run_before_its_first_step(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    model = tiny_llama()
    before = _weights(model).clone()
    with pytest.raises(ModelError, match="HB317"):
        train(model, Listed(rows), PACKED, _run(model, tmp_path))
    assert torch.equal(_weights(model), before)
    assert list(tmp_path.iterdir()) == []
    train(
        model, Listed(rows), PADDED, _run(model, tmp_path)
    )  # padded rows have an attention mask of their own


def test_a_budget_that_does_not_hold_the_longest_row_is_refused(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"HB102[\s\S]*32 tokens[\s\S]*row of 33"):
        train(
            tiny_llama(),
            Listed(rows),
            PACKED.model_copy(update={"batch_tokens": 32}),
            _run(tiny_llama(), tmp_path),
        )


def test_no_rows_are_refused(tiny_llama: Build, tmp_path: Path, config: TrainConfig) -> None:
    with pytest.raises(DataError, match="HB203"):
        train(tiny_llama(), Listed([]), config, _run(tiny_llama(), tmp_path))


def test_a_checkpoint_knows_which_pass_comes_next(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()
    train(model, Listed(rows), config.model_copy(update={"save_steps": 3}), _run(model, tmp_path))
    state = json.loads((tmp_path / "checkpoints/step-000003" / STATE_FILE).read_text(encoding="utf-8"))
    order = order_of([len(row.input_ids) for row in rows], config, 0)
    taken = list(itertools.islice(steps(order, config.gradient_accumulation_steps), 5))
    position = Position(**state["position"])
    assert position == taken[2][1]
    rest = itertools.islice(steps(order, config.gradient_accumulation_steps, position), 2)
    assert list(rest) == taken[3:]


def test_checkpoints_are_saved_every_save_steps(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()
    train(model, Listed(rows), config.model_copy(update={"save_steps": 2}), _run(model, tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    state = json.loads((tmp_path / "checkpoints/step-000004" / STATE_FILE).read_text(encoding="utf-8"))
    assert (state["step"], state["total_steps"], state["reason"]) == (4, 6, "save_steps")
    assert state["loss"] == _lines(tmp_path)[3]["loss"]


class _At(Silent):
    """Does something when a step is done."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._step, self._act = step, act

    def step(self, record: StepRecord) -> None:
        if record.step == self._step:
            self._act()


def test_ctrl_c_saves_a_checkpoint_of_the_last_whole_step(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model, whole = tiny_llama(), tiny_llama()
    before = signal.getsignal(signal.SIGINT)
    display = _At(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainInterrupted, match="after 2 of 6 steps") as caught:
        train(model, Listed(rows), config, _run(model, tmp_path / "cut", display=display))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "cut" / "checkpoints" / "step-000002"
    assert str(folder) in str(caught.value)
    # the same weights as a run that was not cut had after two steps
    train(whole, Listed(rows), config.model_copy(update={"save_steps": 2}), _run(whole, tmp_path / "whole"))
    saved = load_file(folder / "weights.safetensors")
    expected = load_file(tmp_path / "whole/checkpoints/step-000002/weights.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert len(_lines(tmp_path / "cut")) == 2


def test_training_runs_outside_the_main_thread(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(model, Listed(rows), config, _run(model, tmp_path)))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 6


def test_a_bad_loss_names_step_and_rows_and_keeps_the_last_good_weights(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()

    def poison() -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight[0, 0] = float("nan")

    with pytest.raises(TrainError, match=r"HB501[\s\S]*step 4 of 6, rows .*rows\.jsonl:") as caught:
        train(model, Listed(rows), config, _run(model, tmp_path, display=_At(3, poison)))
    assert str(tmp_path / "checkpoints" / "step-000003") in caught.value.fix
    assert len(_lines(tmp_path)) == 3


def test_a_bad_gradient_stops_before_the_update(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model = tiny_llama()
    embedding = model.get_input_embeddings().weight
    embedding.register_hook(lambda gradient: gradient * float("inf"))
    before = _weights(model).clone()
    with pytest.raises(TrainError, match=r"HB502[\s\S]*step 1 of 6"):
        train(model, Listed(rows), config, _run(model, tmp_path))
    assert torch.equal(_weights(model), before)
    assert not (tmp_path / "checkpoints").exists()


def test_bfloat16_autocast_keeps_master_weights_in_float32(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, config: TrainConfig
) -> None:
    model, exact = tiny_llama(), tiny_llama()
    run = TrainRun(tmp_path / "a", lambda folder: None, autocast=torch.bfloat16)
    result = train(model, Listed(rows), config, run)
    reference = train(exact, Listed(rows), config, _run(exact, tmp_path / "b"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.last_loss < 0.8 * result.first_loss
    # bfloat16 was really used: its loss differs, by less than a few of its units in the last place (2^-8)
    assert 0 < abs(result.first_loss - reference.first_loss) <= 4 * 2.0**-8 * reference.first_loss
