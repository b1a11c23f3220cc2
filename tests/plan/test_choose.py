"""Promises of the choice: what does not fit is never recommended, and the refusal says what comes nearest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from halfbyte.config import load_config
from halfbyte.errors import PlanError
from halfbyte.plan.calibrate import Calibration, read_calibration, tokenizer_key, write_calibration
from halfbyte.plan.choose import Asked, Choice, Limits, choices, recommended, refuse_what_does_not_fit
from halfbyte.plan.forecast import Machine
from halfbyte.plan.hardware import find_hardware, named_hardware
from halfbyte.plan.memory import Runtime
from halfbyte.plan.time import Speeds, Timing, from_timing, with_streaming
from halfbyte.plan.work import Sizes, Work
from halfbyte.settings import Config

SPEEDS = Speeds(2e11, 1e10, 1e9, 1e8, 1e9)
RUNTIME = Runtime(4 * 10**8, 4 * 10**8, 4 * 10**8)
SIZES = Sizes(10, 10**9, 10**7, 10**7, 1000, 1000, 0)


@pytest.fixture
def config(shared: Callable[[str], Path]) -> Config:
    base = {"model": str(shared("models/base-11m")), "data": {"train": "rows.jsonl", "max_length": 64}}
    return load_config(None, ["train.batch_size=2"], base)


def asked(config: Config, limits: Limits) -> Asked:
    calibration = Calibration("here", "2026-01-01", SPEEDS, {tokenizer_key(config): RUNTIME})
    machine = Machine(limits.memory_bytes, RUNTIME, "given", calibration)
    return Asked(Work.of([64] * 100, config), machine, find_hardware(Path()), limits)


def ways(config: Config, limits: Limits) -> list[Choice]:
    return choices(config, asked(config, limits))[0]


def test_what_fits_is_recommended_by_method_and_then_speed(config: Config) -> None:
    found = ways(config, Limits(10**11))
    assert len(found) == 7
    assert recommended(found).method == "full"
    full = next(choice for choice in found if choice.method == "full")
    less = ways(config, Limits(full.forecast.peak_bytes - 1))
    assert not next(choice for choice in less if choice.method == "full").fits
    assert recommended(less).fits
    assert recommended(less).method == "lora"


def test_where_nothing_fits_the_nearest_is_named(config: Config) -> None:
    with pytest.raises(PlanError, match="HB703.*nearest comes .*memory"):
        recommended(ways(config, Limits(10**8)))


def test_a_run_that_does_not_fit_is_refused_with_what_takes_less(config: Config) -> None:
    expected = ways(config, Limits(10**11))[1].forecast
    ask = partial(asked, config)
    refuse_what_does_not_fit(config, expected, Limits(expected.peak_bytes), ask)
    with pytest.raises(PlanError, match=r"HB704.*memory[\s\S]*would fit, with"):
        refuse_what_does_not_fit(config, expected, Limits(expected.peak_bytes - 1), ask)
    with pytest.raises(PlanError, match=r"HB704.*disk[\s\S]*nearest comes"):
        refuse_what_does_not_fit(config, expected, Limits(10**11, disk_bytes=0), ask)


def test_a_deadline_decides(config: Config) -> None:
    for choice in ways(config, Limits(10**11, seconds=1e-6)):
        assert any("deadline" in lack for lack in choice.lacks)


def test_hardware_that_is_not_known_is_refused_with_a_near_name() -> None:
    assert named_hardware("l4").price.mid == 0.805
    with pytest.raises(PlanError, match="(?s)HB702.*rtx-4090"):
        named_hardware("rtx4090")


def test_measures_are_kept_for_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.plan.calibrate.machine_name", lambda: "one")
    kept = Calibration("one", "2026-01-01", SPEEDS, {"a": RUNTIME}, {"b": Timing(8, 8.0, {"all": 1.0}, 0.5)})
    write_calibration(tmp_path / "c.json", kept)
    assert read_calibration(tmp_path / "c.json") == kept
    monkeypatch.setattr("halfbyte.plan.calibrate.machine_name", lambda: "two")
    assert read_calibration(tmp_path / "c.json") is None


def test_a_pass_of_twice_the_layers_takes_their_time_twice(config: Config) -> None:
    work = Work.of([64] * 100, config)
    timing = Timing(round(work.tokens_per_pass), work.row_tokens, {"all": 1.0, "input": 1.5}, 0.25)
    grown = work.tokens_per_pass / timing.tokens
    assert from_timing(timing, SIZES, work, Counter(all=2, input=2)) == pytest.approx(5.25 * grown)


def test_streaming_takes_as_long_as_the_slower_of_disk_and_arithmetic(config: Config) -> None:
    work = Work.of([64] * 100, config)
    assert with_streaming(10.0, SIZES, work, 1.0, 1e9) == pytest.approx(10.0)
    slow = with_streaming(10.0, SIZES, work, 1e9, 1e8)
    assert slow == pytest.approx(SIZES.layers * 2 * 10.0 + 10.0)


def test_savings_are_tried_where_no_plain_way_fits_and_are_in_the_recipe(config: Config) -> None:
    """A rank so high that the optimizer's state decides: without it streamed QLoRA would fit."""
    large = config.model_copy(update={"lora": config.lora.model_copy(update={"r": 256})})
    plain = ways(large, Limits(10**11))
    assert not any(choice.saving for choice in plain)
    least = min(choice.forecast.peak_bytes for choice in plain)
    found = ways(large, Limits(least - 20 * 10**6, disk_bytes=10**12))
    best = recommended(found)
    assert best.saving
    assert best.config.train.optimizer == best.saving[0] in ("adamw_8bit", "paged_adamw_8bit")
    assert best.forecast.peak_bytes <= least - 20 * 10**6
    assert len([choice for choice in found if choice.saving]) <= len(plain)
    assert best.name.endswith(best.saving[-1])


def test_every_saving_is_a_choice_where_all_are_asked_for(config: Config) -> None:
    found = choices(config, asked(config, Limits(10**11)), every_saving=True)[0]
    names = [choice.name for choice in found]
    assert "full, keep, paged_adamw_8bit" in names
    assert "qlora, keep, paged_adamw_8bit, activations 8bit" in names
    assert "qlora, recompute, paged_adamw_8bit, activations disk" in names
    assert not any("full" in name and "activations" in name for name in names)
    assert len(names) == len(set(names))
