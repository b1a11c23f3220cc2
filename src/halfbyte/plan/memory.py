"""How much memory a run takes at its peak, and for what: its own code, run on tensors that have none.

It owns the phases of a run as memory sees them; it must not know time, hardware, or what is chosen.

Nothing is fitted: loading, a first step and one with the optimizer's state run as they will, forward and backward,
and what their tensors and the kernels' scratch take is counted as the allocator would give it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from halfbyte.model import blocks
from halfbyte.model.heads import Objective
from halfbyte.model.keep import KeepPlan
from halfbyte.model.mode import measured
from halfbyte.model.precision import computing_dtype
from halfbyte.model.speeds import Speeds
from halfbyte.plan.count import Moment
from halfbyte.plan.live import LiveBytes
from halfbyte.plan.loaded import Base, load_without_memory, open_for_plan
from halfbyte.plan.scratch import KINDS, SCRATCH
from halfbyte.plan.standins import Nowhere, Unkept
from halfbyte.plan.terms import Memory
from halfbyte.quant.weight import QuantSpec
from halfbyte.train.deviation import deviation
from halfbyte.train.methods import autocast_dtype, make_trainable
from halfbyte.train.optimizer import build_optimizer, clip_gradients, trainable_parameters
from halfbyte.train.step import RowNames, TokenLoss, accumulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.model.files import ModelFolder
    from halfbyte.model.purpose import Head
    from halfbyte.model.residency import Residency
    from halfbyte.plan.work import Largest
    from halfbyte.settings import Config
    from halfbyte.tasks.task import Task

_STEPS = 3  # the first makes the optimizer's state; afterwards memory is as it will stay

NO_DISK = Speeds(1.0, 1e-9, 1e-9)
"""Where the disk was not timed: computing again is taken to be quicker."""

Room = Callable[["PreTrainedModel", int], int]
"""Bytes that layers may hold between forward and backward, of a model with its adapters, and what it holds."""


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
        phase: When that is: `prepare`, `load`, `measure`, `backward`, `loss`, `optimizer` or `close`.
        phases: Bytes at the peak of each phase.
        keeps: What layers keep for the backward pass; None where they are not fused.
        room: Bytes that they may hold.
        trainable: Numbers of each tensor that trains.
        layer_bytes: Of the largest layer that lies in a mapped file.
    """

    memory: Memory
    phase: str
    phases: dict[str, int]
    keeps: KeepPlan | None
    room: int
    trainable: tuple[int, ...]
    layer_bytes: int


def peak_of(
    config: Config,
    largest: Largest,
    *,
    runtime: Runtime,
    room: Room,
    residency: Residency | None,
    folder: ModelFolder | None = None,
    speeds: Speeds | None = None,
) -> Peak:
    """What a run takes at its peak.

    Args:
        config: Settings of the run.
        largest: Its largest passes.
        runtime: What the process takes beside its model.
        room: Bytes that layers may hold between forward and backward, of the model and what it holds with its
            adapters.
        residency: Where the base is.
        folder: Of the model, where it is not as it is stored.
        speeds: Of arithmetic and disk, where layers may wait on it.

    Raises:
        HalfbyteError: What the run would have raised for these settings.
    """
    live = LiveBytes(SCRATCH, KINDS)
    with _quiet():
        model = _loaded(config, folder or open_for_plan(config.model), residency, live, largest.head)
        with live, live.doing("load", "adapters"):
            make_trainable(model, config)
        if largest.measure is not None:
            _measure(model, largest.measure, live)
        budget = room(model, sum(live.count.held.values()))
        keeps = blocks.plan_memory(
            model,
            largest.batch.input_ids.size,
            budget,
            activations=config.train.activations,
            speeds=speeds or NO_DISK,
            offload=Nowhere,
        )
        trainable = _train(model, config, largest, live)
    moments = live.count.peaks | {
        "prepare": Moment("prepare", 0, Counter()),
        "close": Moment("close", sum(live.count.held.values()), live.count.held),
    }
    beside = {"prepare": runtime.preparing, "close": runtime.closing}
    phases = {
        phase: moment.resident + beside.get(phase, runtime.training) for phase, moment in moments.items()
    }
    highest = max(phases, key=lambda phase: (phases[phase], moments[phase].live.total()))
    memory = _parts(moments[highest], beside.get(highest, runtime.training))
    return Peak(memory, highest, phases, keeps, budget, trainable, live.layer_bytes)


def peak_of_measuring(task: Task[Any], residency: Residency | None) -> int:
    """Bytes that a model takes at most while it is loaded and its held-out rows are measured, beside the process.

    Args:
        task: Its settings and rows.
        residency: Where the base is.
    """
    live = LiveBytes(SCRATCH, KINDS)
    with _quiet():
        model = _loaded(task.config, open_for_plan(task.config.model), residency, live, task.trained_head)
        with live, live.doing("load", "adapters"):
            make_trainable(model, task.config)
        _measure(model, task.measured_pass, live)
    return max(moment.resident for moment in live.count.peaks.values())


def _loaded(
    config: Config, folder: ModelFolder, residency: Residency | None, live: LiveBytes, head: Head | None
) -> PreTrainedModel:
    spec = QuantSpec(**config.quantization.model_dump()) if config.method == "qlora" else None
    dtype = torch.float32 if config.method == "full" else computing_dtype(config.dtype)
    return load_without_memory(folder, Base(spec, residency), dtype, live, head)


def _measure(model: PreTrainedModel, measure: Callable[[PreTrainedModel], None], live: LiveBytes) -> None:
    """Do as is done with held-out rows."""
    with measured(model), live, live.doing("measure", "activations"):
        measure(model)


def _train(model: PreTrainedModel, config: Config, largest: Largest, live: LiveBytes) -> tuple[int, ...]:
    """Do as `train.loop` does; numbers of each tensor that trains.

    Each part runs once: a pass, one more of the same step, the first update and the next. What they take and give
    back is then told in the order of a run: the trial on the largest batch, and a few steps.
    """
    model.train()
    parameters = trainable_parameters(model).values()
    for parameter in parameters:
        live.call_it(parameter.data, "adapters")
        hook = partial(_is_gradient, live)
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    autocast, passes = autocast_dtype(config), config.train.gradient_accumulation_steps
    divisor = max(1, largest.batch.trained_tokens * passes)
    loss = largest.loss or TokenLoss(Objective(config.train.label_smoothing, config.train.z_loss))

    def passed() -> None:
        casting = torch.autocast("cpu", autocast) if autocast else nullcontext()
        with live.doing("backward", "activations"), casting:
            accumulate(model, largest.batch, divisor, RowNames(), loss)

    def updated(optimizer: torch.optim.Optimizer) -> None:
        with live.doing("optimizer", "buffers"):
            clip_gradients(optimizer, config.train.max_grad_norm)
            with live.doing("optimizer", "optimizer"):
                optimizer.step()

    with live:
        with live.doing("load", "optimizer"):
            own = build_optimizer(model, config.train, Unkept)
        with live.recorded() as compared:
            deviation(model, passed)
        with live.recorded() as begun:
            passed()
        with live.recorded() as more:
            if passes > 1:
                passed()
        with live.recorded() as made, live.doing("optimizer", "optimizer"):
            optimizer = build_optimizer(model, config.train, Unkept)
        with live.recorded() as first:
            updated(optimizer)
        with live.recorded() as again:
            updated(optimizer)
        with live.recorded() as cleared:
            optimizer.zero_grad(set_to_none=True)
        with live.recorded() as dropped:
            del optimizer
    live.count.play([*begun, *made, *first, *cleared, *dropped, *compared])
    for update in (first, *[again] * (_STEPS - 1)):
        live.count.play([*begun, *more, *update, *cleared])
    del own
    live.count.play(dropped)
    return tuple(parameter.numel() for parameter in parameters)


def _is_gradient(live: LiveBytes, parameter: torch.Tensor) -> None:
    live.call_it(parameter.grad, "gradients")


def _parts(moment: Moment, runtime_bytes: int) -> Memory:
    """By part; what the allocator holds beyond what lives is a buffer."""
    named = {name: moment.live[name] for name in Memory._fields if name not in ("buffers", "runtime")}
    return Memory(**named, buffers=moment.resident - sum(named.values()), runtime=runtime_bytes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice to authors of operations that look where tensors lie (all here ask only whether two do
    so at the same place), and without its warning of a gradient that it looks for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield
