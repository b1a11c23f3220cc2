"""How estimates are written for people: three figures, an interval where there is one, `unknown` with its reason.

It owns these few words; it must not know what is estimated.
"""

from __future__ import annotations

from halfbyte.plan.terms import Estimate, Forecast
from halfbyte.train.display import duration

_SMALLER = {"Wh": (("kWh", 1e-3), ("Wh", 1.0), ("mWh", 1e3)), "g": (("kg", 1e-3), ("g", 1.0), ("mg", 1e3))}


def amount(estimate: Estimate) -> str:
    """An estimate in a unit that suits its size: `1.2 Wh (0.4 to 3.6)`.

    Args:
        estimate: What to write.
    """
    if estimate.mid is None or estimate.low is None or estimate.high is None:
        return "unknown"
    units = _SMALLER.get(estimate.unit, ((estimate.unit, 1.0),))
    unit, factor = next((u for u in units if abs(estimate.mid) * u[1] >= 1), units[-1])
    low, mid, high = (f"{value * factor:.3g}" for value in (estimate.low, estimate.mid, estimate.high))
    return f"{mid} {unit}" if low == high else f"{mid} {unit} ({low} to {high})"


def with_reason(estimate: Estimate) -> str:
    """An estimate with how it was got, or why there is none.

    Args:
        estimate: What to write.
    """
    if not estimate.is_known:
        return f"unknown: {estimate.why}"
    return f"{amount(estimate)}, {estimate.method}"


def in_words(forecast: Forecast) -> str:
    """A forecast in a line: memory, then time, energy and cost as far as they are known.

    Args:
        forecast: What to write.
    """
    facts = [f"{forecast.peak_bytes / 1e9:.2f} GB of memory at most ({forecast.phase})"]
    step, seconds = forecast.step_seconds.mid, forecast.seconds.mid
    if step is None or seconds is None:
        return ", ".join([*facts, f"time unknown: {forecast.step_seconds.why}"])
    facts.append(f"{step:.3g} s a step, {duration(seconds)} for {forecast.steps:,} steps")
    facts += [amount(each) for each in (forecast.energy, forecast.cost) if each.is_known]
    return ", ".join(facts)
