"""Numbers for people keep their interval and unit, and what is unknown says why."""

import pytest

from halfbyte.plan.terms import Estimate
from halfbyte.report.amounts import amount, with_reason


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate("Wh", 1.0, 2.0, 6.0, "x"), "2 Wh (1 to 6)"),
        (Estimate("Wh", 1000.0, 2000.0, 6000.0, "x"), "2 kWh (1 to 6)"),
        (Estimate("Wh", 0.0001, 0.00056, 0.0017, "x"), "0.56 mWh (0.1 to 1.7)"),
        (Estimate.exact(381.4, "g", "x"), "381 g"),
        (Estimate.exact(1234.5, "g", "x"), "1.23 kg"),
        (Estimate.exact(0.0, "g", "x"), "0 mg"),
        (Estimate("EUR", 0.01, 0.02, 0.06, "x"), "0.02 EUR (0.01 to 0.06)"),
        (Estimate.unknown("Wh", "no counter"), "unknown"),
    ],
)
def test_amounts_read_well(estimate: Estimate, text: str) -> None:
    assert amount(estimate) == text


def test_the_method_or_the_reason_follows() -> None:
    assert with_reason(Estimate.exact(2.0, "Wh", "measured")) == "2 Wh, measured"
    assert with_reason(Estimate.unknown("Wh", "no counter")) == "unknown: no counter"
