"""What is measured, by name: how each number is called and written, and which way is better.

It owns the list of metrics and the form of a measured one; it must not know how any is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from halfbyte.evaluate.statistics import Interval, Score


@dataclass(frozen=True)
class Kind:
    """How a metric is written and read.

    Attributes:
        label: Its name for people.
        digits: Digits after the point.
        better: 1 where higher is better, -1 where lower is.
        percent: Whether it is a share.
    """

    label: str
    digits: int
    better: Literal[1, -1]
    percent: bool = False

    def text(self, value: float, signed: bool = False) -> str:
        """A value as text; a signed one is a difference, in points where the metric is a share."""
        number = f"{100 * value if self.percent else value:{'+' if signed else ''},.{self.digits}f}"
        return f"{number} %" if self.percent and not signed else number


KINDS = {
    "exact_match": Kind("exact match", 1, 1, percent=True),
    "loss": Kind("held-out loss", 3, -1),
    "perplexity": Kind("perplexity", 2, -1),
    "reward_accuracy": Kind("reward accuracy", 1, 1, percent=True),
    "reward_margin": Kind("reward margin", 3, 1),
    "preference_loss": Kind("preference loss", 3, -1),
}


@dataclass(frozen=True)
class Metric:
    """A measured number.

    Attributes:
        name: One of `KINDS`.
        interval: Value and interval.
        scores: One per item, so that two measurements of the same items can be compared item by item.
        follows: Metric that rises and falls with this one and whose verdict is this one's, instead of `scores`.
    """

    name: str
    interval: Interval
    scores: tuple[Score, ...] = ()
    follows: str | None = None

    @property
    def kind(self) -> Kind:
        """How it is written and read."""
        return KINDS[self.name]

    def described(self) -> str:
        """Name and value."""
        return f"{self.kind.label} {self.kind.text(self.interval.value)}"
