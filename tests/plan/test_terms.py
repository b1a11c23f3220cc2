"""A forecast's numbers keep their origin, and what is unknown stays so."""

import json

import pytest

from halfbyte.plan.terms import Estimate, Forecast, Memory


def test_scaling_keeps_origin_and_an_unknown_number_stays_unknown() -> None:
    power = Estimate("W", 10.0, 20.0, 40.0, "table", "a vendor's sheet", "2024")
    energy = power.times(2.0, "Wh")
    assert energy == Estimate("Wh", 20.0, 40.0, 80.0, "table", "a vendor's sheet", "2024")
    unknown = Estimate.unknown("Wh", "no counter").times(3.0)
    assert not unknown.is_known
    assert unknown.mid is None
    assert unknown.why == "no counter"


def test_a_forecast_s_peak_is_the_sum_of_its_parts_and_it_is_json() -> None:
    memory = Memory(1, 2, 3, 4, 5, 6, 7, 8)
    exact = Estimate.exact(1.5, "s", "measured")
    forecast = Forecast(memory, "backward", 3, exact, exact.times(3), Estimate.unknown("Wh", "x"), exact, 9)
    assert forecast.peak_bytes == 36
    read = json.loads(json.dumps(forecast.as_dict()))
    assert read["memory"]["total"] == 36
    assert read["seconds"]["mid"] == pytest.approx(4.5)
    assert read["energy"]["mid"] is None
