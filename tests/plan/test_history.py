"""Forecasts are compared with what happened, and corrected by it only where enough runs of the same machine agree."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from tests.plan.ledgers import KEY, forecast, ledger, write_run

from halfbyte.errors import PlanError
from halfbyte.plan.history import FEWEST_RUNS, MOST, PastRun, look_back, recalibration, runs_beside
from halfbyte.plan.ledger import LEDGER, Factors, Ledger, Peak, Planned
from halfbyte.plan.terms import Forecast


def past(took: Ledger, planned: Forecast | None = None, factors: Factors | None = None) -> PastRun:
    return PastRun(Path("run"), took, Planned(planned or forecast(), factors or Factors()))


def with_assumptions(made: dict[str, str]) -> Forecast:
    return replace(forecast(), assumptions=made | {"layers": "6 keep all"})


def peak(nbytes: int | None, method: str = "VmHWM") -> Peak:
    return Peak(nbytes, nbytes, 0, 0, method)


def test_errors_are_of_what_was_measured_and_part_by_part() -> None:
    took = ledger(memory=peak(800), step_seconds=2.5, parts={"base": 500, "adapters": 50})
    errors = {d.what: d.error for d in past(took).differences()}
    assert errors == {
        "memory": pytest.approx(0.25),
        "step time": pytest.approx(-0.2),
        "energy": pytest.approx(-0.2),
        "disk": pytest.approx(0.25),
        "base": pytest.approx(-0.2),
        "adapters": 0.0,
    }


def test_what_was_not_measured_has_no_error() -> None:
    took = ledger(memory=peak(None), step_seconds=None, written_bytes=None, parts={})
    assert [d.what for d in past(took).differences()] == ["energy"]
    assert PastRun(Path("run"), took, None).differences() == []


def test_runs_are_found_below_a_folder_and_bad_files_are_named(tmp_path: Path) -> None:
    late = write_run(tmp_path / "a/late", ledger(began="2026-02-01T00:00:00+00:00"), forecast())
    early = write_run(tmp_path / "b", ledger(memory=peak(1250), step_seconds=1.0), forecast())
    torn = write_run(tmp_path / "torn", ledger(), forecast())
    (torn / LEDGER).write_text('{"version": 1', encoding="utf-8")
    (tmp_path / "of-another").mkdir()
    (tmp_path / "of-another" / LEDGER).write_text('{"accounts": []}', encoding="utf-8")
    found = look_back([tmp_path])
    assert [run.folder for run in found.runs] == [early, late]
    assert [one.file.parent.name for one in found.refused] == ["of-another", "torn"]
    errors = {error.what: error for error in found.errors()}
    assert (errors["memory"].runs, errors["memory"].mean) == (2, pytest.approx(0.1))
    assert errors["memory"].worst == pytest.approx(-0.2)
    assert errors["step time"].worst == pytest.approx(1.0)


def test_a_run_with_a_torn_forecast_counts_as_one_without(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ledger(), forecast())
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    found = look_back([folder])
    assert [run.planned for run in found.runs] == [None]
    assert [one.file.name for one in found.refused] == ["plan.json"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="HB710"):
        look_back([tmp_path, tmp_path / "gone"])
    assert look_back([tmp_path]).runs == ()


def test_the_median_of_enough_runs_corrects_and_one_disturbed_run_does_not() -> None:
    runs = [past(ledger(step_seconds=s, memory=peak(m))) for s, m in ((2.2, 1030), (2.4, 1060), (2.3, 1045))]
    factors = recalibration([*runs, past(ledger(step_seconds=200.0, memory=peak(9000)))], KEY)
    assert factors.runs == 4
    assert factors.time == pytest.approx((1.15 + 1.2) / 2)
    assert factors.runtime == pytest.approx((345 + 360) / 2 / 300)
    assert factors.spread[0] == (pytest.approx(1.1), pytest.approx(100.0))
    assert factors.why == ""


def test_too_few_runs_correct_nothing_and_say_so() -> None:
    factors = recalibration([past(ledger(step_seconds=9.0))] * (FEWEST_RUNS - 1), KEY)
    assert (factors.time, factors.runtime, factors.runs) == (1.0, 1.0, 0)
    assert factors.why.startswith(f"{FEWEST_RUNS - 1} run(s) of this machine and version")


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": {"processor": "AMD EPYC", "cores": 4}},
        {"machine": {"processor": "another", "cores": 2}},
        {"versions": {"halfbyte": "1.1"}},
        {"state": "failed"},
        {"memory": peak(None), "step_seconds": None},
        {"memory": peak(1000, "fullest of the moments looked at"), "step_seconds": None},
        {"memory": peak(600), "step_seconds": None},
    ],
)
def test_runs_that_say_nothing_about_this_machine_do_not_count(changes: dict[str, object]) -> None:
    runs = [past(ledger(**changes))] * FEWEST_RUNS
    assert recalibration(runs, KEY).runs == 0
    assert recalibration([*runs, *[past(ledger())] * FEWEST_RUNS], KEY).time == 1.0


def test_a_corrected_forecast_is_not_corrected_twice() -> None:
    """The planner says 2 s, the machine takes 3: once corrected, forecasts are right and the factor stays."""
    first = recalibration([past(ledger(step_seconds=3.0, memory=peak(1150)))] * 3, KEY)
    assert (first.time, first.runtime) == (1.5, 1.5)
    corrected = past(
        ledger(step_seconds=3.0, memory=peak(1150)),
        forecast(2.0 * first.time, int(300 * first.runtime)),
        first,
    )
    assert [d.error for d in corrected.differences()[:2]] == [0.0, 0.0]
    again = recalibration([corrected] * 3, KEY)
    assert (again.time, again.runtime) == (1.5, 1.5)


def test_only_runs_whose_forecasts_were_made_alike_count() -> None:
    """Streamed runs are slower than forecast here, resident ones are not: each is corrected by its own."""
    made = {"method": "qlora", "base": "resident", "runtime": "measured"}
    plain = [past(ledger(), with_assumptions(made)) for _ in range(3)]
    slow = [past(ledger(step_seconds=2.6), with_assumptions(made | {"base": "streamed"})) for _ in range(3)]
    assert recalibration([*plain, *slow], KEY, made).time == 1.0
    assert recalibration([*plain, *slow], KEY, made | {"base": "streamed"}).time == pytest.approx(1.3)
    assert recalibration([*plain, *slow], KEY, made | {"method": "lora"}).runs == 0


def test_memory_is_corrected_where_time_was_not_forecast() -> None:
    took = ledger(step_seconds=None, memory=peak(1060))
    factors = recalibration([past(took)] * 3, KEY)
    assert (factors.time, factors.runs) == (1.0, 3)
    assert factors.runtime == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("seconds", "nbytes", "factor"), [(200.0, 5000, MOST), (0.02, 701, 1 / MOST)], ids=["more", "less"]
)
def test_no_correction_goes_beyond_half_again(seconds: float, nbytes: int, factor: float) -> None:
    factors = recalibration([past(ledger(step_seconds=seconds, memory=peak(nbytes)))] * 3, KEY)
    assert (factors.time, factors.runtime) == (pytest.approx(factor), pytest.approx(factor))


def test_correction_reduces_the_error_on_runs_it_has_not_seen() -> None:
    """A machine whose steps take 1.2 times what is forecast and whose process takes 1.15 times, each run off by up to
    5 % for its own reasons: what 5 runs teach halves the error on 20 others at least."""
    random_of = random.Random(0)

    def happened() -> PastRun:
        step, own = 2.0 * 1.2 * random_of.uniform(0.95, 1.05), 300 * 1.15 * random_of.uniform(0.95, 1.05)
        return past(ledger(step_seconds=step, memory=peak(round(700 + own))))

    factors = recalibration([happened() for _ in range(5)], KEY)
    before, after = [], []
    for run in [happened() for _ in range(20)]:
        corrected = forecast(2.0 * factors.time, round(300 * factors.runtime))
        both = (PastRun(run.folder, run.ledger, Planned(each)) for each in (forecast(), corrected))
        errors = [each.differences()[:2] for each in both]
        assert [d.what for d in errors[0]] == ["memory", "step time"]
        for found, those in zip((before, after), errors, strict=True):
            found.append([abs(d.error) for d in those])
    for what in range(2):
        assert statistics.fmean(e[what] for e in after) < 0.5 * statistics.fmean(e[what] for e in before)


def test_runs_beside_one_are_found_and_no_others(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ledger(), forecast())
    write_run(tmp_path / "deeper/b", ledger(), forecast())
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / LEDGER).write_text("{", encoding="utf-8")
    assert [run.folder for run in runs_beside(tmp_path / "new")] == [tmp_path / "a"]
    assert runs_beside(tmp_path / "nowhere/new") == ()
