"""Money and CO2 come from given figures or from dated rows; what neither has is unknown with what to set."""

from __future__ import annotations

import pytest

from halfbyte.config import load_config
from halfbyte.errors import ConfigError
from halfbyte.plan.cost import co2_of, cost_of
from halfbyte.plan.prices import ELECTRICITY, GRID, MACHINES
from halfbyte.plan.terms import Estimate
from halfbyte.settings import CostConfig

HOUR = Estimate.exact(3600.0, "s", "measured")
ENERGY = Estimate("Wh", 500.0, 1000.0, 2000.0, "estimated")


def test_co2_is_energy_by_grid_with_its_source_and_year() -> None:
    co2 = co2_of(ENERGY, CostConfig(country="DE"))
    assert (co2.unit, co2.low, co2.mid, co2.high) == ("g", 190.5, 381.0, 762.0)
    assert co2.date == "2023"
    assert "Ember" in co2.source


def test_what_is_given_wins_over_the_table_and_pue_multiplies() -> None:
    co2 = co2_of(ENERGY, CostConfig(country="DE", grid_g_per_kwh=100.0, pue=1.5))
    assert co2.mid == pytest.approx(150.0)
    assert "PUE 1.5" in co2.method
    assert co2.source == "cost.grid_g_per_kwh"
    assert co2_of(ENERGY, CostConfig(grid_g_per_kwh=0.0)).mid == 0.0  # given, so zero is known


@pytest.mark.parametrize(
    ("settings", "why"), [(CostConfig(), "set cost.country"), (CostConfig(country="XK"), "listed for XK")]
)
def test_an_unknown_grid_says_what_to_set(settings: CostConfig, why: str) -> None:
    co2 = co2_of(ENERGY, settings)
    assert co2.mid is None
    assert why in co2.why


def test_unknown_energy_makes_unknown_money_and_co2() -> None:
    unknown = Estimate.unknown("Wh", "no counter")
    assert co2_of(unknown, CostConfig(country="FR")).why == "no counter"
    assert cost_of(HOUR, unknown, CostConfig(country="FR")).why == "no counter"
    rented = CostConfig(currency="USD", machine_price_per_hour=2.0)
    assert cost_of(HOUR, unknown, rented).mid == 2.0  # its electricity is in the price


def test_a_machine_at_home_costs_its_electricity() -> None:
    cost = cost_of(HOUR, ENERGY, CostConfig(country="FR"))
    assert (cost.unit, cost.mid) == ("EUR", pytest.approx(0.2926))
    assert cost.high == pytest.approx(2 * 0.2926)
    assert "Eurostat" in cost.source
    given = cost_of(HOUR, ENERGY, CostConfig(country="FR", currency="CHF", price_per_kwh=0.3))
    assert (given.unit, given.mid) == ("CHF", pytest.approx(0.3))


def test_a_rented_machine_costs_its_hours_and_electricity_only_if_that_has_a_price() -> None:
    rented = CostConfig(country="FR", currency="EUR", machine_price_per_hour=2.0)
    assert cost_of(HOUR, ENERGY, rented).mid == 2.0
    both = CostConfig(currency="EUR", machine_price_per_hour=2.0, price_per_kwh=0.25, pue=2.0)
    assert cost_of(HOUR, ENERGY, both).mid == pytest.approx(2.5)
    assert cost_of(HOUR, ENERGY, both).high == pytest.approx(3.0)


def test_a_listed_machine_has_an_interval_and_a_date() -> None:
    cost = cost_of(HOUR, ENERGY, CostConfig(), machine="h100")
    assert (cost.unit, cost.low, cost.high, cost.date) == ("USD", 1.99, 5.0, "May 2026")
    assert 1.99 < (cost.mid or 0.0) < 5.0
    assert "not EUR" in cost_of(HOUR, ENERGY, CostConfig(currency="EUR"), machine="h100").why
    assert "no price is listed for abacus" in cost_of(HOUR, ENERGY, CostConfig(), machine="abacus").why


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (CostConfig(), "set cost.country, or"),
        (CostConfig(country="US"), "listed for US"),
        (CostConfig(country="FR", currency="USD"), "in EUR, not USD"),
    ],
)
def test_an_unknown_price_says_what_to_set(settings: CostConfig, why: str) -> None:
    cost = cost_of(HOUR, ENERGY, settings)
    assert cost.mid is None
    assert why in cost.why


def test_every_row_has_a_range_a_source_and_a_date() -> None:
    for row in (*GRID.values(), *ELECTRICITY.values(), *MACHINES.values()):
        assert 0 < row.low <= row.high
        assert row.source
        assert "20" in row.date
    assert {len(country) for country in (*GRID, *ELECTRICITY)} == {2}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("cost.price_per_kwh=0.3", "cost.currency"),
        ("cost.machine_price_per_hour=3", "cost.currency"),
        ("cost.country=Germany", "cost.country"),
        ("cost.country=de", "cost.country"),
        ("cost.pue=0.9", "greater than or equal to 1"),
        ("cost.machine_watts=0", "greater than 0"),
        ("cost.currency=Euro", "cost.currency"),
    ],
)
def test_settings_of_cost_that_mean_nothing_are_refused(override: str, fault: str) -> None:
    base = {"model": "m", "data": {"train": "rows.jsonl"}}
    with pytest.raises(ConfigError, match="HB102") as caught:
        load_config(None, [override], base)
    assert fault in str(caught.value)
    assert load_config(None, ["cost.currency=EUR", "cost.price_per_kwh=0.3"], base).cost.price_per_kwh == 0.3
