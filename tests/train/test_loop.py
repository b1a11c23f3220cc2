"""Promises of the training loop: deterministic, recorded, stoppable, and loud at the first bad number."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from halfbyte.config import TrainConfig
from halfbyte.data.pack import batches
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.train.checkpoint import STATE_FILE
from halfbyte.train.display import Silent
from halfbyte.train.interrupt import TrainInterrupted
from halfbyte.train.loop import Plan, TrainRun, train
from halfbyte.train.metrics import StepRecord
from halfbyte.train.step import batch_loss

Build = Callable[[], PreTrainedModel]
CONFIG = TrainConfig(batch_size=2, gradient_accumulation_steps=3, epochs=3, learning_rate=1e-2)


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
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama().eval()
    result = train(model, rows, CONFIG, _run(model, tmp_path))
    lines = _lines(tmp_path)
    # 8 rows in micro-batches of 2, 3 of which make a step: 2 steps an epoch, the second of 1 micro-batch
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines] == [0.75, 1.0, 1.75, 2.0, 2.75, 3.0]
    assert result.last_loss < 0.8 * result.first_loss
    assert (result.first_loss, result.last_loss) == (lines[0]["loss"], lines[-1]["loss"])
    assert (
        result.tokens == 3 * sum(len(row.input_ids) for row in rows) == sum(line["tokens"] for line in lines)
    )
    assert result.trained_tokens == 3 * sum(int(row.trained.sum()) for row in rows)
    assert [line["lr"] for line in lines[:2]] == [5e-3, 1e-2]  # 1 warm-up step of 6
    for line in lines:
        assert min(line["grad_norm"], line["tokens_per_s"], line["seconds"]) > 0
    assert not model.training


def test_the_same_seed_gives_the_same_weights_bit_by_bit(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    def trained(seed: int, name: str) -> torch.Tensor:
        model = tiny_llama()
        torch.rand(ord(name))  # whatever torch's generator did before does not matter
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        train(model, rows, CONFIG, _run(model, tmp_path / name, seed))
        return _weights(model)

    first = trained(3, "a")
    assert torch.equal(first, trained(3, "b"))
    assert not torch.equal(first, trained(4, "c"))


def test_every_step_is_adamw_on_its_own_gradient_at_its_own_rate(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    """Against the loop written out plainly, one micro-batch a step."""
    config = TrainConfig(batch_size=2, max_steps=4, learning_rate=1e-2, warmup_ratio=0.5, max_grad_norm=None)
    model, plain = tiny_llama(), tiny_llama()
    train(model, rows, config, _run(model, tmp_path))
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0, fused=True)
    for batch, factor in zip(batches(rows, 2, 0, 0, 0), (1 / 3, 2 / 3, 1.0, 0.5), strict=True):
        batch_loss(plain, batch, batch.trained_tokens).objective.backward()
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(_weights(model), _weights(plain))


@pytest.mark.parametrize("change", [{"label_smoothing": 0.2}, {"z_loss": 0.01}], ids=str)
def test_another_objective_is_minimised_but_the_loss_reported_stays_plain(
    change: dict[str, float], tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    """The first step's loss is before any update, so the same whatever is minimised; the weights after it are not."""
    config = CONFIG.model_copy(update={"max_steps": 3})
    plain, other = tiny_llama(), tiny_llama()
    train(plain, rows, config, _run(plain, tmp_path / "plain"))
    train(other, rows, config.model_copy(update=change), _run(other, tmp_path / "other"))
    expected, found = _lines(tmp_path / "plain"), _lines(tmp_path / "other")
    assert found[0]["loss"] == expected[0]["loss"]
    assert found[2]["loss"] != expected[2]["loss"]
    assert all(line["objective"] not in (None, line["loss"]) for line in found)
    assert [line["objective"] for line in expected] == [None] * 3
    assert not torch.equal(_weights(plain), _weights(other))


def test_max_steps_decides_over_epochs(tiny_llama: Build, rows: list[Example], tmp_path: Path) -> None:
    model = tiny_llama()
    config = CONFIG.model_copy(update={"max_steps": 5, "epochs": 1})
    assert train(model, rows, config, _run(model, tmp_path)).steps == 5


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "epochs", "expected"),
    [(8, 2, 3, 1, 2), (8, 8, 1, 1, 1), (9, 8, 1, 2, 4), (10, 1, 4, 0.5, 2), (1, 8, 8, 0.1, 1)],
)
def test_the_plan_counts_optimizer_steps(
    rows: int, batch: int, accumulate: int, epochs: float, expected: int
) -> None:
    config = TrainConfig(batch_size=batch, gradient_accumulation_steps=accumulate, epochs=epochs)
    assert Plan.of(rows, config).total_steps == expected


def test_checkpoints_are_saved_every_save_steps(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()
    train(model, rows, CONFIG.model_copy(update={"save_steps": 2}), _run(model, tmp_path))
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
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model, whole = tiny_llama(), tiny_llama()
    before = signal.getsignal(signal.SIGINT)
    display = _At(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainInterrupted, match="after 2 of 6 steps") as caught:
        train(model, rows, CONFIG, _run(model, tmp_path / "cut", display=display))
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    folder = tmp_path / "cut" / "checkpoints" / "step-000002"
    assert str(folder) in str(caught.value)
    # the same weights as a run that was not cut had after two steps
    train(whole, rows, CONFIG.model_copy(update={"save_steps": 2}), _run(whole, tmp_path / "whole"))
    saved = load_file(folder / "weights.safetensors")
    expected = load_file(tmp_path / "whole/checkpoints/step-000002/weights.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert len(_lines(tmp_path / "cut")) == 2


def test_training_runs_outside_the_main_thread(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(model, rows, CONFIG, _run(model, tmp_path)))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 6


def test_a_bad_loss_names_step_and_rows_and_keeps_the_last_good_weights(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()

    def poison() -> None:
        with torch.no_grad():
            model.get_output_embeddings().weight[0, 0] = float("nan")

    with pytest.raises(TrainError, match=r"HB501[\s\S]*step 4 of 6, rows .*rows\.jsonl:") as caught:
        train(model, rows, CONFIG, _run(model, tmp_path, display=_At(3, poison)))
    assert str(tmp_path / "checkpoints" / "step-000003") in caught.value.fix
    assert len(_lines(tmp_path)) == 3


def test_a_bad_gradient_stops_before_the_update(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()
    embedding = model.get_input_embeddings().weight
    embedding.register_hook(lambda gradient: gradient * float("inf"))
    before = _weights(model).clone()
    with pytest.raises(TrainError, match=r"HB502[\s\S]*step 1 of 6"):
        train(model, rows, CONFIG, _run(model, tmp_path))
    assert torch.equal(_weights(model), before)
    assert not (tmp_path / "checkpoints").exists()


def test_bfloat16_autocast_keeps_master_weights_in_float32(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model, exact = tiny_llama(), tiny_llama()
    run = TrainRun(tmp_path / "a", lambda folder: None, autocast=torch.bfloat16)
    result = train(model, rows, CONFIG, run)
    reference = train(exact, rows, CONFIG, _run(exact, tmp_path / "b"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.last_loss < 0.8 * result.first_loss
    # bfloat16 was really used: its loss differs, by less than a few of its units in the last place (2^-8)
    assert 0 < abs(result.first_loss - reference.first_loss) <= 4 * 2.0**-8 * reference.first_loss
