"""How much memory a run takes at its peak, and for what: its own code, run on tensors that have none.

It owns the phases of a run as memory sees them; it must not know time, hardware, or what is chosen.

Nothing is fitted: loading, a first step and one with the optimizer's state run as they will, forward and backward,
and what their tensors and the kernels' scratch take is counted as the allocator would give it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from halfbyte.model import blocks
from halfbyte.model.keep import KeepPlan
from halfbyte.model.precision import computing_dtype
from halfbyte.plan.live import LiveBytes, Moment
from halfbyte.plan.loaded import Base, load_without_memory, open_for_plan
from halfbyte.plan.scratch import KINDS, SCRATCH
from halfbyte.plan.terms import Memory
from halfbyte.quant.weight import QuantSpec
from halfbyte.train.methods import autocast_dtype, make_trainable
from halfbyte.train.optimizer import build_optimizer, clip_gradients, trainable_parameters
from halfbyte.train.step import RowNames, TokenLoss, accumulate
from halfbyte.train.trial import try_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch
    from halfbyte.model.files import ModelFolder
    from halfbyte.model.residency import Residency
    from halfbyte.settings import Config

_STEPS = 3  # the first makes the optimizer's state; afterwards memory is as it will stay


class Runtime(NamedTuple):
    """Resident bytes of a training process beside what its model takes.

    Attributes:
        preparing: While rows are read and encoded.
        training: While it trains.
        closing: While it writes its results and draws.
    """

    preparing: int
    training: int
    closing: int


@dataclass(frozen=True)
class Peak:
    """The memory of a run.

    Attributes:
        memory: At its highest.
        phase: When that is: `prepare`, `load`, `backward`, `loss`, `optimizer` or `close`.
        phases: Bytes at the peak of each phase.
        keeps: What layers keep for the backward pass; None where they are not fused.
        trainable: Numbers that train.
        layer_bytes: Of the largest layer that lies in a mapped file.
    """

    memory: Memory
    phase: str
    phases: dict[str, int]
    keeps: KeepPlan | None
    trainable: int
    layer_bytes: int


def peak_of(
    config: Config,
    batch: Batch,
    *,
    runtime: Runtime,
    activation_bytes: int,
    residency: Residency | None,
    folder: ModelFolder | None = None,
) -> Peak:
    """What a run takes at its peak.

    Args:
        config: Settings of the run.
        batch: Its largest.
        runtime: What the process takes beside its model.
        activation_bytes: What layers may hold between forward and backward.
        residency: Where the base is, as `train.methods.chosen_residency` gives it.
        folder: Of the model, where it is not as it is stored.

    Raises:
        HalfbyteError: What the run would have raised for these settings.
    """
    live = LiveBytes(SCRATCH, KINDS)
    with _quiet():
        model = _loaded(config, folder or open_for_plan(config.model), residency, live)
        with live, live.doing("load", "adapters"):
            make_trainable(model, config)
        keeps = blocks.plan_memory(model, batch.input_ids.size, activation_bytes)
        trainable = _train(model, config, batch, live)
    moments = live.peaks | {
        "prepare": Moment("prepare", 0, Counter()),
        "close": Moment("close", sum(live.held.values()), live.held),
    }
    beside = {"prepare": runtime.preparing, "close": runtime.closing}
    phases = {
        phase: moment.resident + beside.get(phase, runtime.training) for phase, moment in moments.items()
    }
    highest = max(phases, key=lambda phase: (phases[phase], moments[phase].live.total()))
    memory = _parts(moments[highest], beside.get(highest, runtime.training))
    return Peak(memory, highest, phases, keeps, trainable, live.layer_bytes)


def _loaded(
    config: Config, folder: ModelFolder, residency: Residency | None, live: LiveBytes
) -> PreTrainedModel:
    spec = QuantSpec(**config.quantization.model_dump()) if config.method == "qlora" else None
    dtype = torch.float32 if config.method == "full" else computing_dtype(config.dtype)
    return load_without_memory(folder, Base(spec, residency), dtype, live)


def _train(model: PreTrainedModel, config: Config, batch: Batch, live: LiveBytes) -> int:
    """Do as `train.loop` does with every step; numbers that train."""
    model.train()
    parameters = trainable_parameters(model).values()
    for parameter in parameters:
        live.call_it(parameter.data, "adapters")
        hook = partial(_is_gradient, live)
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    autocast = autocast_dtype(config)
    rows, loss, passes = RowNames(), TokenLoss(), config.train.gradient_accumulation_steps
    with live:
        optimizer = build_optimizer(model, config.train)
        with live.doing("backward", "activations"):
            try_step(model, batch, config.train, loss, autocast)
        for _ in range(_STEPS):
            with live.doing("backward", "activations"):
                for _ in range(min(passes, 2)):
                    with torch.autocast("cpu", autocast) if autocast else nullcontext():
                        accumulate(model, batch, max(1, batch.trained_tokens * passes), rows, loss)
            with live.doing("optimizer", "buffers"):
                clip_gradients(optimizer, config.train.max_grad_norm)
                with live.doing("optimizer", "optimizer"):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return sum(parameter.numel() for parameter in parameters)


def _is_gradient(live: LiveBytes, parameter: torch.Tensor) -> None:
    live.call_it(parameter.grad, "gradients")


def _parts(moment: Moment, runtime_bytes: int) -> Memory:
    """By part; what the allocator holds beyond what lives is a buffer."""
    named = {name: moment.live[name] for name in Memory._fields if name not in ("buffers", "runtime")}
    return Memory(**named, buffers=moment.resident - sum(named.values()), runtime=runtime_bytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice to authors of operations that look where tensors lie; all here ask only whether two do
    so at the same place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield
