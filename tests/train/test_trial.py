"""Promises of the trial step: it is on the largest batch, leaves no trace, and tells too little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.order import Packed, Padded
from halfbyte.data.pack import pack
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.model.lora import add_lora
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.settings import TrainConfig
from halfbyte.train.loop import TrainRun, rehearse, train
from halfbyte.train.optimizer import OPTIMIZERS
from halfbyte.train.step import TokenLoss
from halfbyte.train.trial import enough_memory, try_step

Build = Callable[[], PreTrainedModel]
LENGTHS = np.array([3, 9, 4, 8, 5, 7, 2, 6], np.int64)


def test_the_largest_batch_holds_the_longest_rows() -> None:
    assert Padded(LENGTHS, 3, 0).largest == [1, 3, 5]
    assert Padded(LENGTHS, 30, 0).largest == [1, 3, 5, 7, 4, 2, 0, 6]
    packed = Packed(LENGTHS, 20, 0)
    assert packed.largest == [1, 3, 0]  # 9 + 8 + 3: the longest row, and full to the last token
    for epoch in range(20):
        for window in packed.windows(epoch):
            assert all(LENGTHS[p].sum() <= LENGTHS[packed.largest].sum() for p in window)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_trial_leaves_no_trace(tiny_llama: Build, rows: list[Example], optimizer: str) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4, dropout=0.5), seed=1)
    model.train()
    torch.manual_seed(3)
    config = TrainConfig(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    before, random = {n: p.detach().clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    batch = pack(rows[:4])
    trial = try_step(model, batch, config, TokenLoss())
    assert (trial.tokens, trial.seconds > 0) == (batch.tokens, True)
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_a_gradient_that_is_not_finite_leaves_no_trace_either(tiny_llama: Build, rows: list[Example]) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4), seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    try_step(model, pack(rows[:4]), TrainConfig(), TokenLoss())
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())


def test_a_rehearsal_times_what_training_would_do_first(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = tiny_llama()
    add_lora(model, LoraSpec(r=4), seed=1)
    config = TrainConfig(batch_size=2, packing=False, max_steps=1)
    trial = rehearse(model, Listed(rows), config, TrainRun(tmp_path / "none", lambda _: None))
    assert trial.tokens == sum(sorted(e.tokens for e in rows)[-2:])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_too_little_memory_is_told(error: Exception) -> None:
    with pytest.raises(TrainError, match=r"HB513[\s\S]*too little memory for it"), enough_memory("it"):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("it"):
        raise RuntimeError("shapes do not fit")


def test_a_training_tries_before_it_steps(tiny_llama: Build, rows: list[Example], tmp_path: Path) -> None:
    """The first pass a loss is asked for is the largest there can be."""

    class Watched(TokenLoss):
        seen: list[int] = []  # noqa: RUF012

        def share(self, model: PreTrainedModel, batch, divisor):  # type: ignore[no-untyped-def]
            self.seen.append(batch.tokens)
            return super().share(model, batch, divisor)

    model = tiny_llama()
    add_lora(model, LoraSpec(r=4), seed=1)
    config = TrainConfig(batch_size=2, packing=False, max_steps=3)
    train(model, Listed(rows), config, TrainRun(tmp_path, lambda _: None, loss=Watched()))
    assert len(Watched.seen) == 4
    assert Watched.seen[0] == max(Watched.seen) == sum(sorted(e.tokens for e in rows)[-2:])
