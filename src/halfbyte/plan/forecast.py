"""What a run will take: memory by part, time, disk, from its settings and the lengths of its rows.

It owns how the parts become one forecast; it must not know how any part is got, nor which other run would fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from halfbyte.model.precision import computing_dtype
from halfbyte.model.speeds import Speeds as LayerSpeeds
from halfbyte.plan.cost import cost_of
from halfbyte.plan.energy import energy_of, power_of
from halfbyte.plan.history import PastRun, recalibration
from halfbyte.plan.ledger import Factors
from halfbyte.plan.memory import Peak, Runtime, peak_of
from halfbyte.plan.terms import Estimate, Forecast
from halfbyte.plan.time import estimate, from_timing, of_optimizer, operations, with_streaming
from halfbyte.plan.work import Sizes, Work
from halfbyte.system import processor_name
from halfbyte.train.memory import HELD_SHARE
from halfbyte.train.optimizer import state_bytes, to_come_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.model.files import ModelFolder
    from halfbyte.model.residency import Residency
    from halfbyte.plan.calibrate import Calibration
    from halfbyte.settings import Config

UNCALIBRATED = "this machine is not calibrated: halfbyte plan --calibrate"
TRAINS = "trains"
NO_SPEED_OF_DISK = "how fast the disk reads is not known"


@dataclass(frozen=True)
class Machine:
    """What a run may use, and what is known of where it runs.

    Attributes:
        memory_bytes: Memory that it may take.
        runtime: What its process takes beside its model.
        runtime_method: How that was got.
        calibration: Measures of it; None where there are none.
        past: Runs by which forecasts are corrected.
        key: `Ledger.machine_key` of this machine.
        factors: What forecasts of it are multiplied with.
    """

    memory_bytes: int
    runtime: Runtime
    runtime_method: str
    calibration: Calibration | None = None
    past: Sequence[PastRun] = ()
    key: tuple[object, ...] = ()
    factors: Factors = field(default_factory=Factors)

    def for_runs_like(self, config: Config, residency: Residency | None) -> Machine:
        """The same with what past runs of that method and residency say of forecasts made as this one."""
        like = {"method": config.method, "base": residency or TRAINS, "runtime": self.runtime_method}
        return replace(self, factors=recalibration(self.past, self.key, like))

    @property
    def corrected(self) -> Runtime:
        """What its process takes, as past runs correct it."""
        return Runtime(*(int(nbytes * self.factors.runtime) for nbytes in self.runtime))


@dataclass(frozen=True)
class Outlook:
    """A forecast, and the choice that it rests on.

    Attributes:
        forecast: What a run will take.
        room: Bytes that layers may hold between forward and backward.
        speeds: Of arithmetic and disk, by which layers wait there or not; None where they need not.
    """

    forecast: Forecast
    room: int
    speeds: LayerSpeeds | None


def forecast(
    config: Config,
    work: Work,
    machine: Machine,
    residency: Residency | None,
    *,
    folder: ModelFolder | None = None,
) -> Outlook:
    """What a run will take.

    Args:
        config: Settings of the run.
        work: What it has to do.
        machine: Where it runs; decides what layers keep where the settings do not.
        residency: Where the base is; None where all of it trains.
        folder: Of the model, where it is not as it is stored.

    Raises:
        HalfbyteError: What the run would have raised for these settings.
    """
    speeds = _layer_speeds(config, machine)
    peak = peak_of(
        config,
        work.largest,
        runtime=machine.corrected,
        room=partial(_room, config, machine),
        residency=residency,
        folder=folder,
        speeds=speeds,
    )
    step = _step(config, work, machine, residency, peak).times(machine.factors.time)
    seconds = step.times(work.steps)
    power = power_of(processor_name(), torch.get_num_threads(), config.cost.machine_watts)
    energy = energy_of(seconds, power)
    found = Forecast(
        memory=peak.memory,
        phase=peak.phase,
        steps=work.steps,
        step_seconds=step,
        seconds=seconds,
        energy=energy,
        cost=cost_of(seconds, energy, config.cost),
        disk_bytes=disk_bytes_of(config, work.steps, peak),
        assumptions=_assumptions(config, work, peak, machine, residency),
    )
    return Outlook(found, peak.room, speeds)


def _room(config: Config, machine: Machine, model: PreTrainedModel, held: int) -> int:
    """What layers may hold: what the settings say, or a share of what is left beside all else."""
    given = config.train.activation_memory_gb
    if given is not None:
        return int(given * 1e9)
    beside = held + machine.corrected.training + to_come_bytes(model, config.train)
    return int(HELD_SHARE * max(0, machine.memory_bytes - beside))


def _layer_speeds(config: Config, machine: Machine) -> LayerSpeeds | None:
    """Of this machine, where layers may wait on a disk and it was measured."""
    known = machine.calibration
    if config.train.activations != "disk" or known is None:
        return None
    speeds = known.speeds
    if speeds.read_bytes_per_s is None or speeds.write_bytes_per_s is None:
        return None
    return LayerSpeeds(speeds.flops, speeds.write_bytes_per_s, speeds.read_bytes_per_s)


def _step(config: Config, work: Work, machine: Machine, residency: Residency | None, peak: Peak) -> Estimate:
    """Time of a step."""
    known = machine.calibration
    if work.untimed or known is None:
        return Estimate.unknown("s", work.untimed or UNCALIBRATED)
    sizes, trainable, speeds = Sizes.of(config.model, dtype_of(config)), sum(peak.trainable), known.speeds
    paged = state_bytes(config.train.optimizer, peak.trainable).disk
    keeps = Counter(keep.kept.name.lower() for keep in peak.keeps.keeps) if peak.keeps else None
    keeps = keeps or Counter(all=sizes.layers)
    timing = known.timing(config, work)
    if timing is not None:
        seconds = from_timing(timing, sizes, work, keeps)
    else:
        seconds = operations(sizes, work, trainable, config.method, keeps) / speeds.flops
    if residency == "streamed" or paged:
        if speeds.read_bytes_per_s is None or speeds.write_bytes_per_s is None:
            return Estimate.unknown("s", NO_SPEED_OF_DISK)
        if residency == "streamed":
            read = max(speeds.read_bytes_per_s, speeds.direct_bytes_per_s or 0.0)
            seconds = with_streaming(seconds, sizes, work, peak.layer_bytes, read)
        seconds += paged / speeds.read_bytes_per_s + paged / speeds.write_bytes_per_s
    seconds += of_optimizer(trainable, speeds)
    return estimate(seconds, measured=timing is not None, source=known.machine, date=known.date)


def disk_bytes_of(config: Config, steps: int, peak: Peak) -> int:
    """What a run writes: checkpoints, its result, pages of the optimizer's state, and layers that wait."""
    train, weights = config.train, 4 * sum(peak.trainable)
    state = state_bytes(train.optimizer, peak.trainable)
    checkpoints = 0
    if train.save_steps is not None:
        written = steps // train.save_steps
        checkpoints = written if train.save_total_limit is None else min(written, train.save_total_limit)
    if train.keep == "best":
        checkpoints += 1
    waiting = peak.keeps.disk_bytes if peak.keeps else 0
    return weights + checkpoints * (weights + state.memory + state.disk) + state.disk + waiting


def dtype_of(config: Config) -> torch.dtype:
    """What everything is held in that is not in 4 bits."""
    return torch.float32 if config.method == "full" else computing_dtype(config.dtype)


def _assumptions(
    config: Config, work: Work, peak: Peak, machine: Machine, residency: Residency | None
) -> dict[str, str]:
    batch = work.largest.batch
    found = {
        "method": config.method,
        "base": residency or TRAINS,
        "largest pass": f"{batch.tokens:,} tokens, {len(batch.documents):,} rows",
        "trained tokens": f"{work.trained_share:.0%} of all",
        "runtime": machine.runtime_method,
    }
    if peak.keeps is not None:
        found["layers"] = peak.keeps.described()
    if machine.factors.runs:
        found["corrected"] = machine.factors.described()
    return found
