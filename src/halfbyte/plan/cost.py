"""What energy and time come to: money and CO2, as intervals with their source, or unknown with the reason.

It owns the two sums and which figure wins; the figures themselves stand in `prices`, and it must not know runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from halfbyte.plan.prices import ELECTRICITY, GRID, MACHINES, Row
from halfbyte.plan.terms import Estimate

if TYPE_CHECKING:
    from halfbyte.settings import CostConfig

SECONDS_PER_HOUR = 3600.0
WH_PER_KWH = 1000.0


def co2_of(energy: Estimate, settings: CostConfig) -> Estimate:
    """CO2 of some energy, in g.

    Args:
        energy: In Wh, of the machine.
        settings: Where it stands, or its grid's CO2.
    """
    grid = _grid(settings)
    for part in (energy, grid):
        if not part.is_known:
            return Estimate.unknown("g", part.why)
    return _times(energy, grid, "g", (settings.pue or 1.0) / WH_PER_KWH, _with_pue("energy × grid", settings))


def cost_of(seconds: Estimate, energy: Estimate, settings: CostConfig, machine: str = "") -> Estimate:
    """Money for some time and energy: the machine's hours, and the electricity that is paid for apart.

    A rented machine's price holds its electricity, so where a machine's price is given or listed, a price of
    electricity counts only if it is given too.

    Args:
        seconds: Time on the machine.
        energy: In Wh, of the machine.
        settings: Prices given, and the country.
        machine: A rented machine's name in `prices.MACHINES`; empty for this one.
    """
    unit = settings.currency or "money"
    parts = []
    rent = _rent(settings, machine)
    if rent is not None:
        parts.append((seconds, rent, 1 / SECONDS_PER_HOUR, "hours × price"))
    if rent is None or settings.price_per_kwh is not None:
        pue = (settings.pue or 1.0) / WH_PER_KWH
        parts.append((energy, _electricity(settings), pue, _with_pue("energy × price", settings)))
    for amount, price, _, _ in parts:
        for part in (price, amount):
            if not part.is_known:
                return Estimate.unknown(unit, part.why)
    sums = [_times(amount, price, price.unit, factor, how) for amount, price, factor, how in parts]
    return _sum(sums)


def _grid(settings: CostConfig) -> Estimate:
    if settings.grid_g_per_kwh is not None:
        return Estimate.exact(settings.grid_g_per_kwh, "g/kWh", "given", "cost.grid_g_per_kwh")
    if settings.country is None:
        why = "where the machine stands is not known: set cost.country, or cost.grid_g_per_kwh"
        return Estimate.unknown("g/kWh", why)
    if settings.country not in GRID:
        return Estimate.unknown("g/kWh", f"no grid is listed for {settings.country}: set cost.grid_g_per_kwh")
    return estimate_of(GRID[settings.country])


def _electricity(settings: CostConfig) -> Estimate:
    currency = settings.currency or "money"
    if settings.price_per_kwh is not None:
        return Estimate.exact(settings.price_per_kwh, currency, "given", "cost.price_per_kwh")
    if settings.country is None:
        return Estimate.unknown(
            currency, "no price is known: set cost.country, or cost.currency and cost.price_per_kwh"
        )
    if settings.country not in ELECTRICITY:
        why = f"no price of electricity is listed for {settings.country}: set cost.price_per_kwh"
        return Estimate.unknown(currency, why)
    return _in_currency(estimate_of(ELECTRICITY[settings.country]), settings, "cost.price_per_kwh")


def _rent(settings: CostConfig, machine: str) -> Estimate | None:
    """Price of an hour; None where nothing is paid by the hour."""
    if settings.machine_price_per_hour is not None:
        unit = settings.currency or "money"
        return Estimate.exact(settings.machine_price_per_hour, unit, "given", "cost.machine_price_per_hour")
    if not machine:
        return None
    if machine not in MACHINES:
        why = f"no price is listed for {machine}: set cost.machine_price_per_hour"
        return Estimate.unknown(settings.currency or "money", why)
    return _in_currency(estimate_of(MACHINES[machine]), settings, "cost.machine_price_per_hour")


def _in_currency(price: Estimate, settings: CostConfig, setting: str) -> Estimate:
    if settings.currency not in (None, price.unit):
        why = f"the price listed is in {price.unit}, not {settings.currency}: set {setting}"
        return Estimate.unknown(str(settings.currency), why)
    return price


def estimate_of(row: Row) -> Estimate:
    """A published figure, most likely in the geometric middle of what was published."""
    middle = math.sqrt(row.low * row.high)
    return Estimate(row.unit, row.low, middle, row.high, "table", row.source, row.date)


def _with_pue(how: str, settings: CostConfig) -> str:
    return how if settings.pue is None else f"{how} × PUE {settings.pue:g}"


def _times(amount: Estimate, rate: Estimate, unit: str, factor: float, how: str) -> Estimate:
    ends = {end: getattr(amount, end) * getattr(rate, end) * factor for end in ("low", "mid", "high")}
    how = f"{how} ({rate.method}); {amount.method}"
    return Estimate(unit, **ends, method=how, source=rate.source, date=rate.date)


def _sum(parts: list[Estimate]) -> Estimate:
    ends = {end: sum(getattr(part, end) for part in parts) for end in ("low", "mid", "high")}
    method, source, date = (
        " + ".join(dict.fromkeys(filter(None, (getattr(part, name) for part in parts))))
        for name in ("method", "source", "date")
    )
    return Estimate(parts[0].unit, **ends, method=method, source=source, date=date)
