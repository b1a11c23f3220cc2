"""Tables of what others published: CO2 of a kWh, price of a kWh, price of an hour of a machine.

It owns these rows with their source and date; it must not know what is computed from them, and never guesses a row.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A published figure.

    Attributes:
        low: Least that was published.
        high: Most that was published.
        unit: Its unit.
        source: Who published it.
        date: What it is of.
    """

    low: float
    high: float
    unit: str
    source: str
    date: str


EMBER = "Ember's yearly means, by Our World in Data, as CodeCarbon ships them"
EUROSTAT = "Eurostat nrg_pc_204 as the press gave it: households, taxes included"
_GRID_2023 = {
    "NO": 30, "CH": 35, "SE": 41, "FR": 56, "FI": 79, "BR": 98, "AT": 111, "BE": 138, "DK": 152, "PT": 166,
    "CA": 170, "ES": 174, "GB": 238, "NL": 268, "IE": 291, "CL": 291, "IT": 331, "US": 369, "DE": 381, "KR": 431,
    "CZ": 450, "TR": 465, "SG": 471, "JP": 485, "MX": 507, "AU": 549, "CN": 582, "TW": 642, "PL": 662, "ZA": 708,
    "IN": 713,
}  # fmt: skip
_GRID_2022 = {"IS": 28, "AE": 561, "ID": 676}
_ELECTRICITY_2024 = {
    "DE": 0.3943, "DK": 0.3763, "IE": 0.3699, "BE": 0.3313, "CZ": 0.3302, "CY": 0.3251, "IT": 0.3111, "FR": 0.2926,
    "PT": 0.2626, "MT": 0.1301, "BG": 0.1217, "HU": 0.1032,
}  # fmt: skip

GRID: dict[str, Row] = {
    country: Row(grams, grams, "g/kWh", EMBER, year)
    for year, rows in (("2023", _GRID_2023), ("2022", _GRID_2022))
    for country, grams in rows.items()
}
"""Grams of CO2-equivalents per kWh, by country."""
ELECTRICITY: dict[str, Row] = {
    country: Row(price, price, "EUR", EUROSTAT, "second half of 2024")
    for country, price in _ELECTRICITY_2024.items()
}
"""Price of a kWh, by country."""
MACHINES: dict[str, Row] = {
    "h100": Row(1.99, 5.00, "USD", "Mercatus, rented GPUs", "May 2026"),
    "a100-80": Row(0.80, 3.00, "USD", "Mercatus, rented GPUs", "May 2026"),
    "g4dn.xlarge": Row(0.526, 0.526, "USD", "Citadel, list prices on demand", "2026"),
    "g5.xlarge": Row(1.006, 1.006, "USD", "Citadel, list prices on demand", "2026"),
    "g6.xlarge": Row(0.805, 0.805, "USD", "Citadel, list prices on demand", "2026"),
    "g6e.xlarge": Row(1.862, 1.862, "USD", "Citadel, list prices on demand", "2026"),
}
"""Price of an hour of a rented machine, its electricity included; by third parties, and soon out of date."""
