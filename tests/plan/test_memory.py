"""Promises of the forecast of memory: it counts what real tensors take, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from halfbyte.config import load_config
from halfbyte.model import blocks
from halfbyte.model.layer import Keep
from halfbyte.plan.heap import THRESHOLD, Heap
from halfbyte.plan.live import LiveBytes
from halfbyte.plan.loaded import open_for_plan
from halfbyte.plan.memory import Peak, Runtime, peak_of
from halfbyte.plan.scratch import KINDS, SCRATCH
from halfbyte.plan.work import Sizes, Work
from halfbyte.settings import Config
from halfbyte.train.methods import load_base, make_trainable
from halfbyte.train.optimizer import state_bytes
from halfbyte.train.step import RowNames, TokenLoss, accumulate

NOTHING = Runtime(0, 0, 0)
ALL_BYTES = 10**9


@pytest.fixture
def model(shared: Callable[[str], Path]) -> Path:
    return shared("models/base-11m")


def settings(model: Path, *overrides: str) -> Config:
    base = {"model": str(model), "data": {"train": "rows.jsonl", "max_length": 64}}
    return load_config(None, ["train.batch_size=2", *overrides], base)


def forecast(config: Config, **given: object) -> Peak:
    activation_bytes = given.pop("activation_bytes", ALL_BYTES)
    told = {"runtime": NOTHING, "room": lambda *_: activation_bytes, "residency": "resident"} | given
    return peak_of(config, Work.of([64, 40, 33] * 4, config).largest, **told)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("budget", [0, ALL_BYTES])
def test_tensors_without_memory_are_counted_as_real_ones_are(model: Path, method: str, budget: int) -> None:
    config = settings(model, f"method={method}", "dtype=float32")
    work = Work.of([64, 40, 33] * 4, config)
    real, batch = load_base(config), work.largest.batch
    make_trainable(real, config)
    blocks.plan_memory(real, work.largest.batch.input_ids.size, budget)
    real.train()
    live = LiveBytes(SCRATCH, KINDS)
    for tensor in (*real.parameters(), *real.buffers()):
        live.know(tensor.data, "base")
    live.count.peaks.clear()
    with live, live.doing("backward", "activations"):
        accumulate(real, batch, batch.trained_tokens, RowNames(), TokenLoss())
    counted = max(live.count.peaks.values(), key=lambda moment: moment.resident).live
    residency = None if method == "full" else "resident"
    found = forecast(config, activation_bytes=budget, residency=residency).memory
    of_pass = found.activations + found.loss + found.gradients
    assert of_pass == pytest.approx(sum(counted.values()) - counted["base"] - counted["buffers"], rel=0.12)
    assert found.adapters == sum(p.nbytes for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("lion", 1), ("sgd", 0)])
def test_the_optimizers_state_is_in_the_forecast(model: Path, optimizer: str, states: int) -> None:
    found = forecast(settings(model, f"train.optimizer={optimizer}"))
    assert found.memory.optimizer == pytest.approx(4 * states * sum(found.trainable), rel=0.01)


def test_what_layers_compute_again_is_not_held(model: Path) -> None:
    config = settings(model)
    kept, again = forecast(config), forecast(config, activation_bytes=0)
    assert again.memory.activations < 0.6 * kept.memory.activations
    assert again.keeps is not None
    assert {keep.name for keep in again.keeps.keeps[:-1]} == {"INPUT"}


def test_streaming_holds_two_layers(model: Path) -> None:
    config = settings(model, "method=lora", "dtype=bfloat16")
    streamed, resident = forecast(config, residency="streamed"), forecast(config)
    assert streamed.layer_bytes > 0
    assert streamed.memory.base < resident.memory.base
    assert resident.memory.base >= Sizes.of(config.model, torch.bfloat16).parameters * 2 * 0.99


def test_a_bare_configuration_is_forecast_as_its_folder_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert not open_for_plan(tmp_path).tensors
    bare, whole = (forecast(settings(path)).memory for path in (tmp_path, model))
    assert bare.total == pytest.approx(whole.total, rel=0.02)


def test_freed_memory_is_used_again_and_large_blocks_are_given_back() -> None:
    heap = Heap()
    first, second = heap.take(1 << 20), heap.take(1 << 20)
    before = heap.resident
    heap.give(first)
    assert heap.resident == before
    heap.take(1 << 19)
    assert heap.resident == before
    large = heap.take(2 * THRESHOLD)
    assert heap.resident >= before + 2 * THRESHOLD
    heap.give(large)
    assert heap.resident == before
    heap.give(second)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_small_states_are_in_memory_as_far_as_they_are(model: Path, optimizer: str) -> None:
    """Of paged ones the buffers between memory and pages, and what is too small for a page."""
    found = forecast(settings(model, f"train.optimizer={optimizer}", "lora.r=64"))
    state = state_bytes(optimizer, found.trainable)  # type: ignore[arg-type]
    counted = found.memory.optimizer
    expected = state.memory + state.buffers
    assert (
        expected <= counted <= 1.02 * expected + state.buffers
    )  # the trial has buffers of its own meanwhile
    assert (state.disk > 0) == optimizer.startswith("paged")


def test_what_waits_on_disk_or_in_8_bits_is_not_held(model: Path) -> None:
    """Bounds at which layers would be computed again; a rank so low that there are few gradients."""
    exact = forecast(settings(model, "lora.r=1"), activation_bytes=ALL_BYTES)
    assert exact.keeps is not None
    half = exact.keeps.peak_bytes // 2
    rounded = forecast(settings(model, "lora.r=1", "train.activations=8bit"), activation_bytes=half)
    waiting = forecast(settings(model, "lora.r=1", "train.activations=disk"), activation_bytes=1)
    assert rounded.keeps is not None
    assert waiting.keeps is not None
    assert Keep.EIGHT_BIT in rounded.keeps.keeps
    assert Keep.DISK_INPUT in waiting.keeps.keeps
    assert waiting.keeps.disk_bytes > 0
    again = forecast(settings(model, "lora.r=1"), activation_bytes=1)
    assert waiting.memory.activations < again.memory.activations < exact.memory.activations
    assert again.memory.activations < rounded.memory.activations < exact.memory.activations


def test_what_is_told_again_counts_as_if_it_happened_again(model: Path) -> None:
    """Gradients of two passes are summed: a second pass of a step takes what the first gave back, and no more."""
    once, twice = (forecast(settings(model, f"train.gradient_accumulation_steps={n}")).memory for n in (1, 2))
    assert twice.optimizer == once.optimizer
    assert twice.total - once.total <= 2 * once.adapters


def test_measuring_is_a_phase_of_its_own(model: Path) -> None:
    config = settings(model)
    largest = Work.of([8] * 4, config).largest
    many = torch.zeros(16, 256, dtype=torch.int64)

    def measure(model: torch.nn.Module) -> None:
        model(input_ids=many, use_cache=True, logits_to_keep=1)

    found = peak_of(
        config,
        replace(largest, measure=measure),
        runtime=NOTHING,
        room=lambda *_: ALL_BYTES,
        residency="resident",
    )
    assert found.phase == "measure"
    heads = 2 * 16 * 256 * 2  # keys and values of all tokens in bfloat16, by layer and width
    assert found.memory.activations > heads


def test_states_of_an_optimizer_take_no_memory_and_small_numbers_are_real() -> None:
    live = LiveBytes(SCRATCH, KINDS)
    with live, live.doing("optimizer", "optimizer"):
        state, counter = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(())
    assert isinstance(state, FakeTensor)
    assert not isinstance(counter, FakeTensor)
    assert state.is_contiguous()
    assert live.count.live["optimizer"] == (1 << 20) + 4
