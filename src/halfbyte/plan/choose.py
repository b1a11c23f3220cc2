"""Which ways of tuning a model fit a machine, and the one to take.

It owns the list of ways, what fits means, and the order of preference; it must not know how anything is forecast or
shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from halfbyte.config import load_config
from halfbyte.errors import HalfbyteError, PlanError
from halfbyte.model.files import ModelFolder
from halfbyte.plan.energy import energy_of
from halfbyte.plan.forecast import Machine, dtype_of, forecast
from halfbyte.plan.loaded import open_for_plan, stored_in_4bit
from halfbyte.plan.terms import Estimate, Forecast
from halfbyte.plan.work import Sizes

if TYPE_CHECKING:
    from halfbyte.model.keep import Activations
    from halfbyte.model.residency import Residency
    from halfbyte.plan.hardware import Hardware
    from halfbyte.plan.work import Work
    from halfbyte.settings import Config, Optimizer

Way = Literal["keep", "recompute", "stream"]

KEEP_GB, RECOMPUTE_GB = 1e6, 0.001
BYTES_4BIT = 0.516  # per weight, with nested scales

WAYS: tuple[tuple[str, Way], ...] = (
    ("full", "keep"),
    *((method, way) for method in ("lora", "qlora") for way in ("keep", "recompute", "stream")),
)
"""By preference of method: full tuning moves every weight, LoRA keeps the base as it is, QLoRA rounds it."""


class Saving(NamedTuple):
    """Settings that take less memory.

    Attributes:
        optimizer: In place of adamw.
        activations: What layers may do beside keeping and computing again.
        ways: Of tuning that it helps; empty for all.
    """

    optimizer: Optimizer
    activations: Activations = "exact"
    ways: tuple[Way, ...] = ()


SAVINGS = (
    Saving("adamw_8bit"),
    Saving("paged_adamw_8bit"),
    Saving("paged_adamw_8bit", "8bit", ("keep",)),
    Saving("paged_adamw_8bit", "disk"),
)
"""In the order in which they are tried: 8 bits of state cost nothing that was seen, pages some time, activations in 8
bits a little of the gradient, and activations on disk the most time."""


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Attributes:
        memory_bytes: Memory.
        disk_bytes: Disk; None where that is not known.
        seconds: Time; None for no deadline.
        cost: Money, in the currency of prices; None for no limit.
    """

    memory_bytes: int
    disk_bytes: int | None = None
    seconds: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Choice:
    """A way of tuning, what it takes, and what it lacks.

    Attributes:
        method: full, lora or qlora.
        way: Whether layers keep what the backward pass needs, compute it again, or come from the disk besides.
        config: Settings of the run.
        forecast: What it takes.
        lacks: What is too little, in words; empty where it fits.
        before: Commands to be given first.
        saving: Settings that take less memory than the plain way: an optimizer, what layers may do.
    """

    method: str
    way: Way
    config: Config
    forecast: Forecast
    lacks: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    saving: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The choice in words."""
        return ", ".join([self.method, self.way, *self.saving])

    @property
    def fits(self) -> bool:
        """Whether nothing lacks."""
        return not self.lacks


class Asked(NamedTuple):
    """For what ways are looked for.

    Attributes:
        work: What there is to do.
        machine: Where, and what is known of it.
        hardware: The same as it is called and paid for.
        limits: What a run may take.
    """

    work: Work
    machine: Machine
    hardware: Hardware
    limits: Limits


def choices(
    config: Config, asked: Asked, *, every_saving: bool = False
) -> tuple[list[Choice], dict[str, str]]:
    """Every way of tuning, with what it takes. Where none fits, each way is tried with less dear states of the
    optimizer, then with layers that keep in 8 bits or on disk; the first of these that fits is a further choice.

    Args:
        config: Settings that all have in common.
        asked: Work, machine and limits.
        every_saving: Have all of these as choices, also where they are not needed.

    Returns:
        The ways, by preference of method; and those that cannot be, with the reason.
    """
    found: list[Choice] = []
    not_possible: dict[str, str] = {}
    for method, way in WAYS:
        try:
            found.append(_choice(config, method, way, asked))
        except HalfbyteError as error:
            not_possible[f"{method}, {way}"] = error.what
    if every_saving:
        found = [each for plain in found for each in (plain, *_with_savings(config, plain, asked))]
    elif not any(choice.fits for choice in found):
        found = [each for plain in found for each in (plain, *_first_that_fits(config, plain, asked))]
    return found, not_possible


def _first_that_fits(config: Config, plain: Choice, asked: Asked) -> list[Choice]:
    """The first saving with which a way fits; none is tried where what no saving changes is too much already."""
    memory = plain.forecast.memory
    left = memory.total - memory.optimizer - memory.activations - memory.buffers
    if left > asked.limits.memory_bytes:
        return []
    fitting = (choice for choice in _with_savings(config, plain, asked) if choice.fits)
    return list(itertools.islice(fitting, 1))


def _with_savings(config: Config, plain: Choice, asked: Asked) -> Iterator[Choice]:
    """A way with settings that take less memory, the cheapest of them first."""
    for saving in SAVINGS:
        changes_optimizer = config.train.optimizer == "adamw" and saving.optimizer != "adamw"
        if saving.ways and plain.way not in saving.ways:
            continue
        if saving.activations != "exact" and plain.method == "full":  # whose layers are not fused
            continue
        if changes_optimizer or saving.activations != config.train.activations:
            yield _choice(config, plain.method, plain.way, asked, saving)


def recommended(found: list[Choice]) -> Choice:
    """Of what fits the method that comes first, and of its ways the fastest.

    Raises:
        PlanError: HB703 where nothing fits; it names what comes nearest and what that lacks.
    """
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        raise nothing_fits(found)
    best = [choice for choice in fitting if choice.method == fitting[0].method]
    return min(best, key=lambda choice: choice.forecast.seconds.mid or float("inf"))


def nothing_fits(found: list[Choice]) -> PlanError:
    """The refusal that names the nearest plan."""
    if not found:
        return PlanError("HB703", "this model cannot be tuned in any way", fix="see halfbyte plan --json")
    nearest = min(found, key=lambda choice: (len(choice.lacks), choice.forecast.peak_bytes))
    return PlanError(
        "HB703",
        f"nothing fits; nearest comes {nearest.name}: {'; '.join(nearest.lacks)}",
        fix="lower data.max_length or train.batch_size, take a smaller model, or give more",
    )


def refuse_what_does_not_fit(
    config: Config, expected: Forecast, limits: Limits, ask: Callable[[Limits], Asked]
) -> None:
    """Refuse a run before its model is loaded.

    Args:
        config: Its settings.
        expected: What it would take.
        limits: What it may take.
        ask: Work and machine, to look for the nearest plan that fits; called only where this one does not.

    Raises:
        PlanError: HB704 with what lacks, and the nearest plan that fits.
    """
    lacks = _lacks(expected, limits)
    if not lacks:
        return
    where = f"method {config.method}"
    raise PlanError("HB704", "; ".join(lacks), where=where, fix=_nearest(config, ask(limits)))


def _nearest(config: Config, asked: Asked) -> str:
    """The plan that fits and is best, or the one that comes nearest, with the settings that make it."""
    found, _ = choices(config, asked)
    fitting = any(choice.fits for choice in found)
    if not fitting:
        return str(nothing_fits(found).what) + "; lower data.max_length or train.batch_size, or give more"
    best = recommended(found)
    first = "".join(f"first {command}, then " for command in best.before)
    takes = _gb(best.forecast.peak_bytes)
    return f"{best.name} would fit, with {takes}: {first}set {_differing(config, best.config)}"


def _differing(config: Config, other: Config) -> str:
    """The settings of another recipe that are not this one's."""
    found = [
        f"{name}={value}"
        for name, value in (
            ("model", other.model),
            ("method", other.method),
            ("residency", other.residency),
            ("train.optimizer", other.train.optimizer),
            ("train.activations", other.train.activations),
            ("train.activation_memory_gb", other.train.activation_memory_gb),
        )
        if value != _value(config, name)
    ]
    return ", ".join(found).replace("=None", "=null")


def _value(config: Config, name: str) -> Any:
    section, _, leaf = name.rpartition(".")
    return getattr(config.train if section else config, leaf)


def _choice(config: Config, method: str, way: Way, asked: Asked, saving: Saving | None = None) -> Choice:
    work, machine, hardware, limits = asked
    folder = open_for_plan(config.model)
    before: tuple[str, ...] = ()
    extra_disk = 0
    settings: dict[str, Any] = config.model_dump()
    settings["method"] = method
    settings["residency"] = {"stream": "streamed"}.get(way, "resident") if method != "full" else "auto"
    bound = {"keep": KEEP_GB if saving is None else None}.get(way, RECOMPUTE_GB)
    settings["train"]["activation_memory_gb"] = bound
    told = _save(settings["train"], saving) if saving is not None else ()
    if method != "qlora" and stored_in_4bit(folder):
        raise PlanError("HB705", "the folder holds its weights in 4 bits", fix="use the 16-bit folder")
    chosen = load_config(None, base=settings)
    if method == "qlora" and way == "stream" and not stored_in_4bit(folder):
        target = f"{folder.path}-{config.quantization.format}"
        before = (f"halfbyte quantize {folder.path} {target}",)
        sizes = Sizes.of(config.model, dtype_of(chosen))
        extra_disk = int(sizes.linear * BYTES_4BIT + (sizes.parameters - sizes.linear) * 2)
        folder = ModelFolder(folder.path, {**folder.config, "quantization_config": {}}, {})
        settings["model"] = target
    residency: Residency | None = None
    if method != "full":
        residency = "streamed" if way == "stream" else "resident"
    own = machine.for_runs_like(config=chosen, residency=residency)
    expected = forecast(chosen, work, own, residency, folder=folder).forecast
    expected = replace(expected, disk_bytes=expected.disk_bytes + extra_disk)
    if not hardware.is_here:
        expected = replace(
            expected, energy=_energy(expected.seconds, hardware), cost=_cost(expected.seconds, hardware)
        )
    used = load_config(None, base=settings if way != "keep" else _without_bound(settings))
    return Choice(method, way, used, expected, tuple(_lacks(expected, limits)), before, told)


def _save(train: dict[str, Any], saving: Saving) -> tuple[str, ...]:
    """Have a recipe save memory; the settings in words."""
    told: list[str] = []
    if train["optimizer"] == "adamw" and saving.optimizer != "adamw":
        train["optimizer"] = saving.optimizer
        told.append(saving.optimizer)
    if saving.activations != "exact":
        train["activations"] = saving.activations
        told.append(f"activations {saving.activations}")
    return tuple(told)


def _without_bound(settings: dict[str, Any]) -> dict[str, Any]:
    """Left to the run: where it fits, it keeps all."""
    return settings | {"train": settings["train"] | {"activation_memory_gb": None}}


def _energy(seconds: Estimate, hardware: Hardware) -> Estimate:
    """Of a machine of the table, at full load: no more than that."""
    if hardware.power_watts is None:
        return Estimate.unknown("Wh", f"no power figure of {hardware.name} is listed")
    power = Estimate(
        "W", 0.5 * hardware.power_watts, 0.8 * hardware.power_watts, hardware.power_watts, "table"
    )
    return energy_of(seconds, power._replace(source=hardware.source, date=hardware.date))


def _cost(seconds: Estimate, hardware: Hardware) -> Estimate:
    price = hardware.price
    if price.mid is None or price.low is None or price.high is None:
        return Estimate.unknown("USD", price.why)
    if seconds.mid is None or seconds.low is None or seconds.high is None:
        return Estimate.unknown("USD", "its time is unknown")
    each = (seconds.low * price.low, seconds.mid * price.mid, seconds.high * price.high)
    low, mid, high = (amount / 3600 for amount in each)
    return Estimate("USD", low, mid, high, "time by price", price.source, price.date)


def _lacks(expected: Forecast, limits: Limits) -> list[str]:
    """What is too little, in words."""
    found = []
    if expected.peak_bytes > limits.memory_bytes:
        found.append(f"{_gb(expected.peak_bytes)} of memory, {_gb(limits.memory_bytes)} may be taken")
    if limits.disk_bytes is not None and expected.disk_bytes > limits.disk_bytes:
        found.append(f"{_gb(expected.disk_bytes)} of disk, {_gb(limits.disk_bytes)} are free")
    seconds = expected.seconds.mid
    if limits.seconds is not None and (seconds is None or not seconds <= limits.seconds):
        known = "an unknown time" if seconds is None else f"{seconds / 3600:.1f} h"
        found.append(f"{known}, the deadline is {limits.seconds / 3600:.1f} h")
    cost = expected.cost.mid
    if limits.cost is not None and cost is not None and cost > limits.cost:
        found.append(f"{cost:.2f} {expected.cost.unit}, the budget is {limits.cost:.2f}")
    return found


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
