"""What a run will take: memory by part, time, disk, from its settings and the lengths of its rows.

It owns how the parts become one forecast; it must not know how any part is got, nor which other run would fit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from halfbyte.model.precision import computing_dtype
from halfbyte.plan.cost import cost_of
from halfbyte.plan.energy import energy_of, power_of
from halfbyte.plan.memory import Peak, peak_of
from halfbyte.plan.terms import Forecast
from halfbyte.plan.time import estimate, from_timing, of_optimizer, operations, with_streaming
from halfbyte.plan.work import Sizes, Work
from halfbyte.system import processor_name
from halfbyte.train.memory import HELD_SHARE
from halfbyte.train.optimizer import state_bytes

if TYPE_CHECKING:
    from halfbyte.model.files import ModelFolder
    from halfbyte.model.residency import Residency
    from halfbyte.plan.calibrate import Calibration
    from halfbyte.settings import Config

CHECKPOINT_BYTES = {"adamw": 12, "lion": 8, "adafactor": 5, "sgd": 4, "adamw_8bit": 6.1, "paged_adamw": 12}
"""Of a checkpoint per number that trains: the weight in float32 and the optimizer's state."""


@dataclass(frozen=True)
class Machine:
    """What a run may use.

    Attributes:
        memory_bytes: Memory that it may take.
        disk_bytes: Free disk.
    """

    memory_bytes: int
    disk_bytes: int


def forecast(
    config: Config,
    work: Work,
    calibration: Calibration,
    machine: Machine,
    residency: Residency | None,
    *,
    folder: ModelFolder | None = None,
) -> Forecast:
    """What a run will take.

    Args:
        config: Settings of the run.
        work: What it has to do.
        calibration: Of this machine.
        machine: What it may use; decides what layers keep where the settings do not.
        residency: Where the base is; None where all of it trains.
        folder: Of the model, where it is not as it is stored.

    Raises:
        HalfbyteError: What the run would have raised for these settings.
    """
    sizes = Sizes.of(config.model, dtype_of(config))
    peak = _peak(config, work, calibration, machine, (residency, folder))
    keeps = (
        Counter(keep.name.lower() for keep in peak.keeps.keeps) if peak.keeps else Counter(all=sizes.layers)
    )
    timing = calibration.timing(config, work)
    if timing is not None:
        seconds = from_timing(timing, sizes, work, keeps)
    else:
        done = operations(sizes, work, peak.trainable, config.method, keeps)
        seconds = done / calibration.speeds.flops
    if residency == "streamed":
        per_layer = peak.layer_bytes
        seconds = with_streaming(seconds, sizes, work, per_layer, calibration.speeds.read_bytes_per_s)
    seconds += of_optimizer(peak.trainable, calibration.speeds)
    step = estimate(seconds, measured=timing is not None, source=calibration.machine, date=calibration.date)
    seconds_in_all = step.times(work.steps)
    power = power_of(processor_name(), torch.get_num_threads(), config.cost.machine_watts)
    energy = energy_of(seconds_in_all, power)
    return Forecast(
        memory=peak.memory,
        phase=peak.phase,
        steps=work.steps,
        step_seconds=step,
        seconds=seconds_in_all,
        energy=energy,
        cost=cost_of(seconds_in_all, energy, config.cost),
        disk_bytes=disk_bytes_of(config, peak.trainable),
        assumptions=_assumptions(config, work, peak, residency),
    )


def _peak(
    config: Config,
    work: Work,
    calibration: Calibration,
    machine: Machine,
    base: tuple[Residency | None, ModelFolder | None],
) -> Peak:
    """Memory, with what layers may keep as the run itself will decide it: of what is left beside the base."""

    def peak(activation_bytes: int) -> Peak:
        return peak_of(
            config,
            work.largest,
            runtime=calibration.runtime(config),
            activation_bytes=activation_bytes,
            residency=base[0],
            folder=base[1],
        )

    given = config.train.activation_memory_gb
    if given is not None:
        return peak(int(given * 1e9))
    least = peak(0)
    state = state_bytes(config.train.optimizer, [least.trainable])
    to_come = 4 * least.trainable + state.memory + state.buffers
    beside = least.memory.base + least.memory.adapters + least.memory.runtime + to_come
    budget = int(HELD_SHARE * max(0, machine.memory_bytes - beside))
    return least if least.keeps is None or budget <= least.keeps.peak_bytes else peak(budget)


def disk_bytes_of(config: Config, trainable: int) -> int:
    """What a run writes: checkpoints, and its result."""
    train = config.train
    checkpoints = 0
    if train.save_steps is not None:
        checkpoints = train.save_total_limit or 3
    if train.keep == "best":
        checkpoints += 1
    each = CHECKPOINT_BYTES.get(train.optimizer, 12)
    return int(trainable * (4 + checkpoints * each))


def dtype_of(config: Config) -> torch.dtype:
    """What everything is held in that is not in 4 bits."""
    return torch.float32 if config.method == "full" else computing_dtype(config.dtype)


def _assumptions(config: Config, work: Work, peak: Peak, residency: Residency | None) -> dict[str, str]:
    found = {
        "largest pass": f"{work.largest.input_ids.size:,} tokens, {len(work.largest.documents):,} rows",
        "base": residency or "trains",
        "trained tokens": f"{work.trained_share:.0%} of all",
    }
    if peak.keeps is not None:
        found["layers"] = peak.keeps.described()
    return found
