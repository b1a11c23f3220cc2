"""How much energy a run takes: from the machine's counters where it has some, else from time and a power figure.

It owns which of the two is taken, and the power figures with their source; it must not know prices or runs.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from halfbyte.plan.counters import open_nvml, open_rapl
from halfbyte.plan.terms import Estimate

WITHOUT_COUNTER = 3.0
"""An energy from time and a power figure may be this many times too high or too low.

Source: the table of powers that CodeCarbon ships against its own RAPL readings errs by -66 to +187 % at 7 % load or
more, and tools like it by up to 40 % against wall meters.
"""
JOULES_PER_WH = 3600.0


class Power(NamedTuple):
    """What a class of processors takes.

    Attributes:
        names: Pattern of the processor's own name.
        watts: Per busy logical core, power supply and memory of the machine included.
        of: What was measured.
        year: Of the measurements.
    """

    names: str
    watts: float
    of: str
    year: str


SPECPOWER = "SPECpower results per thread at full load, as Cloud Carbon Footprint took them together"
POWERS = (
    Power(r"EPYC 7..1\b", 2.55, "EPYC of the first generation", "about 2021"),
    Power(r"EPYC", 1.69, "EPYC of the second generation", "about 2021"),
    Power(r"Xeon.*(Platinum|Gold|Silver) .1\d\d", 4.26, "Skylake servers", "about 2021"),
    Power(r"Xeon.*(Platinum|Gold|Silver) .2\d\d", 3.97, "Cascade Lake servers", "about 2021"),
    Power(r"Xeon", 3.5, "the mean of servers rented out by one provider", "about 2021"),
    Power(r"Graviton|Neoverse", 1.69, "taken to be an EPYC of the second generation", "about 2021"),
    Power(r"Intel.*Core|Ryzen", 5.42, "Coffee Lake, for desktop and laptop processors", "about 2021"),
)


def power_of(processor: str, busy_cores: float, given_watts: float | None = None) -> Estimate:
    """What a machine takes while it computes, in W.

    Args:
        processor: The processor's own name.
        busy_cores: Logical cores at work, on average.
        given_watts: `cost.machine_watts`: the whole machine at work; wins over the table.
    """
    if given_watts is not None:
        return Estimate.exact(given_watts, "W", "given", "cost.machine_watts")
    for row in POWERS:
        if re.search(row.names, processor):
            mid = row.watts * busy_cores
            low, high = mid / WITHOUT_COUNTER, mid * WITHOUT_COUNTER
            source = f"{row.watts:g} W per busy logical core: {row.of}; {SPECPOWER}"
            return Estimate("W", low, mid, high, "table", source, row.year)
    why = f"no power figure is known of {processor or 'this processor'}: set cost.machine_watts"
    return Estimate.unknown("W", why)


def energy_of(seconds: Estimate, power: Estimate) -> Estimate:
    """The energy of some time at some power, in Wh: what a forecast says.

    Args:
        seconds: The time.
        power: In W, as `power_of` gives it or a table of machines.
    """
    for part in (seconds, power):
        if not part.is_known:
            return Estimate.unknown("Wh", part.why)
    low, mid, high = (_product(seconds, power, end) / JOULES_PER_WH for end in ("low", "mid", "high"))
    return Estimate("Wh", low, mid, high, f"time × power ({power.method})", power.source, power.date)


def _product(a: Estimate, b: Estimate, end: str) -> float:
    x, y = getattr(a, end), getattr(b, end)
    return float(x) * float(y)


class Reading(NamedTuple):
    """Energy since a meter began.

    Attributes:
        energy: In Wh.
        counters: What each counter counted, or why it did not.
        seconds: Wall time.
        cpu_seconds: Time that this process and its children computed, over all cores.
    """

    energy: Estimate
    counters: dict[str, str]
    seconds: float
    cpu_seconds: float


class Meter:
    """Measures the energy from its making on.

    RAPL's counters are the whole machine's, other programs included; NVML's are of the GPUs that this process uses.
    Where the processor has no counter, its energy is estimated from the time it computed for this process.

    Args:
        processor: The processor's own name.
        given_watts: `cost.machine_watts`, read where there is no counter.
        root: Where `sys` and `proc` are.
    """

    def __init__(self, processor: str, given_watts: float | None = None, root: Path = Path("/")) -> None:
        self._processor, self._given_watts = processor, given_watts
        self._rapl, self._nvml = open_rapl(root), open_nvml(root)
        self._began, self._cpu_began = time.perf_counter(), _cpu_seconds()

    def advance(self) -> None:
        """Read the counters; at least once a minute, lest one wraps round unseen."""
        self._rapl.advance()
        self._nvml.advance()

    def read(self) -> Reading:
        """The energy so far."""
        self.advance()
        seconds, cpu_seconds = time.perf_counter() - self._began, _cpu_seconds() - self._cpu_began
        told = {"rapl": self._rapl.told, "nvml": self._nvml.told}
        if self._rapl.joules:
            source = (
                f"RAPL ({self._rapl.told}): without disks, fans and power supply, other programs included"
            )
            processor = Estimate.exact(self._rapl.joules / JOULES_PER_WH, "Wh", "measured", source)
            return Reading(self._with_gpus(processor), told, seconds, cpu_seconds)
        if self._rapl.joules == 0:
            told["rapl"] = f"RAPL ({self._rapl.told}) stands still, as in a virtual machine"
        power = power_of(self._processor, cpu_seconds / seconds, self._given_watts)
        energy = energy_of(Estimate.exact(seconds, "s", "measured"), power)
        whole = energy if self._given_watts is not None else self._with_gpus(energy)
        return Reading(whole, told, seconds, cpu_seconds)

    def _with_gpus(self, processor: Estimate) -> Estimate:
        if self._nvml.joules is None:
            return Estimate.unknown("Wh", self._nvml.told)
        if not self._nvml.joules or processor.mid is None or processor.low is None or processor.high is None:
            return processor
        gpus = self._nvml.joules / JOULES_PER_WH
        return processor._replace(
            low=processor.low + gpus,
            mid=processor.mid + gpus,
            high=processor.high + gpus,
            method=f"{processor.method} + measured GPUs",
            source=f"{processor.source}; {self._nvml.told}",
        )


def _cpu_seconds() -> float:
    times = os.times()  # in hundredths of a second, which is too coarse for this process
    return time.process_time() + times.children_user + times.children_system
