"""What a run expects of itself before its model is loaded: its forecast, where its base will be, whether it fits.

It owns these decisions and what they rest on at that moment; it must not know how anything is forecast, or what the
run does with it. Nothing is measured here that takes time: a machine that is not calibrated stays so.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.model.files import open_model_folder
from halfbyte.model.mapped import can_let_go
from halfbyte.model.offload import nearest_folder
from halfbyte.plan.calibrate import calibration_file, read_calibration, tokenizer_key
from halfbyte.plan.choose import Asked, Limits, refuse_what_does_not_fit
from halfbyte.plan.forecast import Machine, Outlook, dtype_of, forecast
from halfbyte.plan.hardware import find_hardware
from halfbyte.plan.history import runs_beside
from halfbyte.plan.ledger import Planned
from halfbyte.plan.memory import Runtime, peak_of_measuring
from halfbyte.plan.work import Work
from halfbyte.system import available_bytes, give_back_freed_memory, process_bytes

if TYPE_CHECKING:
    from halfbyte.model.residency import Residency
    from halfbyte.settings import Config
    from halfbyte.tasks.task import Task

OWN_RUNTIME = (
    "what this process held once its rows were prepared and it was forecast: the machine is not calibrated"
)
MEASURED_RUNTIME = "measured on a tiny model"
WITHIN_SHARE, WITHIN_BYTES = 0.03, 30_000_000
"""How far a forecast of memory may be off: by no more than that beyond what is free is a run not refused."""


@dataclass(frozen=True)
class Expected:
    """What a run expects of itself.

    Attributes:
        outlook: Its forecast; None where none was made.
        residency: Where its base is to be; None where all of it trains.
        because: What decided that, in words; empty where nothing had to.
        planned: Content of plan.json.
        machine: Where it runs; None where that was not asked.
    """

    outlook: Outlook | None
    residency: Residency | None
    because: str
    planned: Planned
    machine: Machine | None = None

    @property
    def held(self) -> dict[str, Any]:
        """What the forecast assumed that layers may hold, for `tasks.keeping.choose_kept`."""
        return {} if self.outlook is None else {"room": self.outlook.room, "speeds": self.outlook.speeds}


def expect(task: Task[Any], key: tuple[object, ...], *, measured: bool) -> Expected:
    """Forecast a run whose rows are prepared, and decide where its base is to be.

    Without a forecast, because the settings ask for none or the task's step cannot be followed, the base is
    resident unless the settings have it streamed.

    Args:
        task: Its settings and rows.
        key: As `Ledger.machine_key`, of this machine.
        measured: Whether held-out rows are measured too.

    Raises:
        HalfbyteError: What the run would have raised for these settings.
    """
    config = task.config
    candidates = _residencies(config)
    if not config.forecast:
        return _nothing("the settings have forecast: false", candidates[0])
    machine = machine_here(config, key)
    try:
        work = Work.of_task(task, measured=measured)
        for residency in candidates:
            own = machine.for_runs_like(config, residency)
            outlook = forecast(config, work, own, residency)
            if outlook.forecast.peak_bytes <= machine.memory_bytes:
                break
    except HalfbyteError:
        raise
    except (
        Exception
    ) as fault:  # any of a model's own code, which meets tensors it was not written for: it is told
        return _nothing(f"its step cannot be followed: {type(fault).__name__}: {fault}", candidates[0])
    outlook = _with_what_it_took(outlook, machine)
    took, room = outlook.forecast.peak_bytes, machine.memory_bytes
    because = ""
    if len(candidates) > 1:
        streamed = residency == "streamed"
        what = "resident it would take more than may be taken" if streamed else f"{_gb(took)} at most"
        because = f"the base is {residency}: {what}, {_gb(room)}"
    return Expected(outlook, residency, because, Planned(outlook.forecast, own.factors), own)


def refuse(task: Task[Any], expected: Expected) -> None:
    """Refuse a run that does not fit, by its forecast: beyond `memory_gb`, which is a promise, or what is free.

    Args:
        task: Its settings and rows.
        expected: What it would take.

    Raises:
        PlanError: HB704 with the nearest plan that fits.
    """
    machine = expected.machine
    if expected.outlook is None or machine is None:
        return
    config, free = task.config, available_bytes() + process_bytes().get("VmRSS", 0)
    most = free + max(WITHIN_BYTES, int(WITHIN_SHARE * free))
    if config.memory_gb is not None:
        most = min(most, int(config.memory_gb * 1e9))
    folder = nearest_folder(Path(config.output_dir))
    limits = Limits(most, shutil.disk_usage(folder).free)

    def ask(limits: Limits) -> Asked:
        return Asked(Work.of_task(task), machine, find_hardware(folder), limits)

    refuse_what_does_not_fit(config, expected.outlook.forecast, limits, ask)


def where_to_measure(task: Task[Any]) -> Residency | None:
    """Where the base of a model is to be that is only measured: in memory, unless that would take too much."""
    config = task.config
    candidates = _residencies(config)
    if len(candidates) == 1 or not config.forecast:
        return candidates[0]
    machine = machine_here(config, ())
    fits = peak_of_measuring(task, "resident") + machine.runtime.training <= machine.memory_bytes
    return candidates[0] if fits else candidates[1]


def machine_here(config: Config, key: tuple[object, ...]) -> Machine:
    """This machine at this moment, with what is known of it; nothing is measured that takes time.

    Args:
        config: Settings of the run.
        key: As `Ledger.machine_key`.
    """
    past = runs_beside(Path(config.output_dir))
    now = process_bytes()
    held = now.get("VmRSS", 0)
    free = available_bytes() + held
    memory = free if config.memory_gb is None else min(free, int(config.memory_gb * 1e9))
    calibration = read_calibration(calibration_file())
    known = calibration.runtimes.get(tokenizer_key(config)) if calibration is not None else None
    runtime = Runtime(now.get("VmHWM", held), held, held)
    if known is None:
        return Machine(memory, runtime, OWN_RUNTIME, calibration, past, key)
    fullest = Runtime(runtime.preparing, max(known.training, held), max(known.closing, held))
    return Machine(memory, fullest, MEASURED_RUNTIME, calibration, past, key)


def _residencies(config: Config) -> list[Residency | None]:
    """Where the base may be, what is best first."""
    if config.method == "full":
        return [None]
    if config.residency != "auto":
        return [config.residency]
    return ["resident", "streamed"] if _can_be_streamed(config) else ["resident"]


def _can_be_streamed(config: Config) -> bool:
    """Whether the base lies in its file as it is computed with, and nothing of the run changes it."""
    folder = open_model_folder(config.model)
    if config.lora.init in ("pissa", "loftq") or not can_let_go():
        return False
    if config.method == "qlora":
        return "quantization_config" in folder.config
    return all(
        tensor.dtype == dtype_of(config) for tensor in folder.tensors.values() if len(tensor.shape) > 1
    )


def _with_what_it_took(outlook: Outlook, machine: Machine) -> Outlook:
    """The outlook of a machine that is not calibrated, with what the process has grown by until it was forecast."""
    if machine.runtime_method != OWN_RUNTIME:
        return outlook
    give_back_freed_memory()
    grown = max(0, process_bytes().get("VmRSS", 0) - machine.runtime.training)
    memory = outlook.forecast.memory
    memory = memory._replace(runtime=memory.runtime + grown)
    return replace(outlook, forecast=replace(outlook.forecast, memory=memory))


def _nothing(why: str, residency: Residency | None) -> Expected:
    return Expected(None, residency, "", Planned(why=why))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
