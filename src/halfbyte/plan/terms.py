"""What a forecast is made of: numbers with their interval and how they were got, and memory part by part.

It owns these types and their form in JSON; it must not know models, machines, or how anything is forecast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Estimate(NamedTuple):
    """A number, how sure it is, and where it comes from; unknown is None with a reason, never 0.

    Attributes:
        unit: Unit of the three numbers.
        low: Least that is likely.
        mid: Most likely.
        high: Most that is likely.
        method: How it was got: `measured`, `calibrated`, `table`, `given`, or a few words.
        source: Where a number of a table was published, or what measured it; empty where the method says it all.
        date: Year or day that it is of; empty where it is of now.
        why: Why there is no number; empty where there is one.
    """

    unit: str
    low: float | None
    mid: float | None
    high: float | None
    method: str
    source: str = ""
    date: str = ""
    why: str = ""

    @classmethod
    def exact(cls, value: float, unit: str, method: str, source: str = "", date: str = "") -> Estimate:
        """A number without an interval: counted, measured or given."""
        return cls(unit, value, value, value, method, source, date)

    @classmethod
    def unknown(cls, unit: str, why: str) -> Estimate:
        """No number."""
        return cls(unit, None, None, None, "unknown", why=why)

    @property
    def is_known(self) -> bool:
        """Whether there is a number."""
        return self.mid is not None

    def times(self, factor: float, unit: str | None = None) -> Estimate:
        """The same estimate scaled, in another unit if one is given."""
        low, mid, high = (None if n is None else n * factor for n in (self.low, self.mid, self.high))
        return self._replace(low=low, mid=mid, high=high, unit=unit or self.unit)


class Memory(NamedTuple):
    """Bytes of this process at its peak, part by part.

    Attributes:
        base: The frozen weights that are in memory at once: all, or the layers that are streamed.
        adapters: What trains, as float32; for method full the weights.
        gradients: Of what trains.
        optimizer: The optimizer's state that is in memory.
        activations: What layers hold between forward and backward, a layer that is computed again included.
        loss: The head's chunks of logits and the hidden states' gradient.
        buffers: Scratch of kernels, reading, paging and whatever passes through.
        runtime: Python, PyTorch, transformers and this program before a model is loaded.
    """

    base: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    buffers: int
    runtime: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self)


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        memory: At the moment of the run's highest resident memory.
        phase: That moment: `prepare`, `load`, `measure`, `backward`, `loss`, `optimizer`
            or `close`.
        steps: Optimizer steps.
        step_seconds: Time of one.
        seconds: Time of the whole run's training.
        energy: Wh of the whole run.
        cost: Of the whole run, in a currency.
        disk_bytes: What it writes: quantised base, pages of the optimizer, checkpoints, results.
        assumptions: What was assumed, in a few words each.
    """

    memory: Memory
    phase: str
    steps: int
    step_seconds: Estimate
    seconds: Estimate
    energy: Estimate
    cost: Estimate
    disk_bytes: int
    assumptions: dict[str, str] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory."""
        return self.memory.total

    def as_dict(self) -> dict[str, Any]:
        """The forecast as JSON values."""
        estimates = ("step_seconds", "seconds", "energy", "cost")
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("memory", *estimates)},
            "memory": self.memory._asdict() | {"total": self.memory.total},
            **{name: getattr(self, name)._asdict() for name in estimates},
        }
