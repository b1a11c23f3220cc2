"""Promises of the forecast that every run makes: written, compared, held, and a refusal where it does not fit."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.short_runs import Make, Shared, read_lines, settings_in

from halfbyte.cli.plan_history import history
from halfbyte.errors import PlanError
from halfbyte.pipeline import rehearse, run
from halfbyte.plan import expect as expecting
from halfbyte.plan.expect import OWN_RUNTIME, Expected, expect
from halfbyte.plan.forecast import UNCALIBRATED, Machine
from halfbyte.plan.ledger import Planned, read_plan
from halfbyte.plan.memory import Runtime
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare

SHORT = ("forecast=true", "train.max_steps=3")
OF_NO_WORDS = ("evaluate.max_new_tokens=64", "evaluate.max_items=null")


@pytest.fixture
def make(tmp_path: Path, shared: Shared) -> Make:
    """Builds the settings of a run that takes about a second, with a forecast."""
    build = settings_in(tmp_path, shared)
    return lambda *overrides, **more: build(*SHORT, *overrides, **more)


def planned(folder: Path) -> Planned:
    found = read_plan(folder)
    assert isinstance(found, Planned)
    return found


def expected(config: Config) -> Expected:
    return expect(prepare(config), (), measured=False)


def test_a_run_writes_its_forecast_says_it_and_is_compared_with_it(
    make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process of its own would, in which nothing was held before."""
    monkeypatch.setattr(expecting, "process_bytes", lambda: {"VmRSS": 3 * 10**8, "VmHWM": 3 * 10**8})
    printed = io.StringIO()
    result = run(make("cost.machine_watts=40"), watch=Watch(Console(file=printed, width=300)))
    forecast = planned(result.folder).forecast
    assert forecast is not None
    assert forecast.memory.adapters == result.summary.setting.trainable_parameters * 4
    assert forecast.memory.runtime == 3 * 10**8
    assert forecast.assumptions["runtime"] == OWN_RUNTIME
    assert (forecast.step_seconds.mid, forecast.step_seconds.why) == (None, UNCALIBRATED)
    assert forecast.energy.why == UNCALIBRATED
    assert f"GB of memory at most ({forecast.phase}), time unknown: {UNCALIBRATED}" in printed.getvalue()
    assert result.summary.took is not None
    differences = {d.what: d for d in result.summary.took.differences()}
    assert differences["adapters"].error == 0
    assert "memory" in differences
    history([result.folder], as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert "memory" in {error["what"] for error in told["errors"]}


def test_layers_keep_what_was_forecast(make: Make) -> None:
    """A bound that only some layers keep all in: the run's choice is the forecast's."""
    result = run(make("train.activation_memory_gb=0.0005"), evaluate=False)
    forecast = planned(result.folder).forecast
    assert forecast is not None
    (memory,) = (e for e in read_lines(result.folder / "events.jsonl") if e["event"] == "memory")
    assert {"input", "all"} <= set(memory["keeps"])
    assert f"{memory['keeps'].count('all')} keep all" in forecast.assumptions["layers"]
    assert f"{memory['keeps'].count('input')} are computed again" in forecast.assumptions["layers"]


RUNTIME = 3 * 10**8


def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a process taken to hold as much, whatever tests before this one left in it."""
    here = expecting.machine_here

    def given(config: Config, key: tuple[object, ...]) -> Machine:
        return replace(here(config, key), runtime=Runtime(0, RUNTIME, 0), runtime_method="given")

    monkeypatch.setattr(expecting, "machine_here", given)


def test_a_bound_on_all_memory_gives_layers_what_was_forecast(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory_gb a part is left for layers; free memory that changes meanwhile changes nothing."""
    steady(monkeypatch)
    config = make("memory_gb=40")
    free = iter([10**11, 9 * 10**10, 8 * 10**10])
    monkeypatch.setattr(expecting, "available_bytes", lambda: next(free, 7 * 10**10))
    monkeypatch.setattr("halfbyte.tasks.keeping.available_bytes", lambda: 7 * 10**10)
    result = run(config, evaluate=False)
    (memory,) = (e for e in read_lines(result.folder / "events.jsonl") if e["event"] == "memory")
    assert memory["budget_bytes"] == pytest.approx(0.6 * (40e9 - RUNTIME), rel=0.02)


def test_a_run_beyond_its_promise_is_refused_before_its_model_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("halfbyte.tasks.words.load_base", loaded)
    config = make("memory_gb=0.01")
    with pytest.raises(PlanError, match=r"HB704[\s\S]*0\.01 GB may be taken[\s\S]*nearest comes"):
        run(config)
    assert planned(Path(config.output_dir)).forecast is not None
    with pytest.raises(PlanError, match="HB704"):
        rehearse(make("memory_gb=0.01", f"output_dir={config.output_dir}-2"))


def test_the_refusal_names_the_nearest_plan_that_fits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 512 tokens, 8 in a pass: what layers keep is most of the memory that full tuning takes beside."""
    steady(monkeypatch)
    rows = "\n".join(json.dumps({"text": "the cat sat on the mat " * 60 + str(n)}) for n in range(32))
    full = make(
        "method=full", "data.max_truncated=1", "train.batch_size=8", "data.eval_fraction=0", rows=rows
    )
    task = prepare(full)
    found = expect(task, (), measured=False)
    assert found.outlook is not None
    less = (found.outlook.forecast.peak_bytes - 3 * 10**6) / 1e9
    with pytest.raises(PlanError, match=r"HB704[\s\S]*would fit, with [\s\S]*set method=(q)?lora"):
        run(full.model_copy(update={"memory_gb": less}))


def test_a_run_is_not_refused_for_what_a_forecast_may_be_off(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make()
    found = expected(config)
    assert found.outlook is not None
    took = found.outlook.forecast.peak_bytes
    now = {"VmRSS": 0, "VmHWM": 0}
    monkeypatch.setattr(expecting, "process_bytes", lambda: now)
    task = prepare(config)
    for missing, is_refused in ((20_000_000, False), (60_000_000, took < 2 * 10**9)):
        monkeypatch.setattr(expecting, "available_bytes", lambda missing=missing: took - missing)
        if is_refused:
            with pytest.raises(PlanError, match="HB704"):
                expecting.refuse(task, found)
        else:
            expecting.refuse(task, found)


def test_too_little_disk_is_told_before_the_model_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = prepare(make())
    found = expect(task, (), measured=False)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(expecting.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(PlanError, match=r"HB704[\s\S]*of disk"):
        expecting.refuse(task, found)


def test_a_step_that_cannot_be_followed_is_told_and_the_run_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("an operation without a form")

    monkeypatch.setattr("halfbyte.plan.forecast.peak_of", fails)
    printed = io.StringIO()
    result = run(make(), evaluate=False, watch=Watch(Console(file=printed, width=300)))
    assert planned(result.folder).forecast is None
    why = "its step cannot be followed: RuntimeError: an operation without a form"
    assert planned(result.folder).why == why
    assert why in printed.getvalue()


def test_no_forecast_is_made_where_none_is_wanted(make: Make) -> None:
    result = run(make("forecast=false"), evaluate=False)
    assert planned(result.folder) == Planned(None, why="the settings have forecast: false")
    assert "forecast" not in [e["event"] for e in read_lines(result.folder / "events.jsonl")]


def test_a_rehearsal_shows_the_forecast_beside_its_trial(make: Make) -> None:
    found = rehearse(make())
    assert found.expected.outlook is not None
    assert found.expected.outlook.forecast.steps == found.plan.total_steps == 3
    assert found.trial.peak_rss_bytes is not None


Rows = list[dict[str, Any]]
JUDGED: Rows = [
    {"prompt": f"The cat {n}", "chosen": " ran to the hill.", "rejected": " sat."} for n in range(16)
]


@pytest.mark.parametrize("task", ["dpo", "simpo", "orpo"])
def test_tasks_of_judged_answers_are_forecast_with_their_own_loss(make: Make, task: str) -> None:
    config = make(f"task={task}", *OF_NO_WORDS, rows="\n".join(map(json.dumps, JUDGED)))
    found = expect(prepare(config), (), measured=True)
    assert found.outlook is not None, found.planned.why
    assert found.outlook.forecast.step_seconds.why == UNCALIBRATED


def test_the_time_of_a_step_that_does_more_is_unknown(make: Make) -> None:
    rows: Rows = [
        {"prompt": f"The cat {n}", "completion": " ran to the hill.", "label": n % 2 == 0} for n in range(16)
    ]
    config = make("task=kto", *OF_NO_WORDS, rows="\n".join(map(json.dumps, rows)))
    found = expect(prepare(config), (), measured=False)
    assert found.outlook is not None, found.planned.why
    assert "task kto" in found.outlook.forecast.step_seconds.why


Find = Callable[[str], Path]


def test_classes_of_texts_are_forecast_with_their_head(make: Make, shared: Find) -> None:
    """Two classes more are two rows and two biases of 32 bits more that are trained and written."""
    written = []
    for labels in ("ab", "abcd"):
        rows: Rows = [
            {"text": f"the cat sat on mat {n}", "label": labels[n % len(labels)]} for n in range(16)
        ]
        model = f"model={shared('models/all-MiniLM-L6-v2-fp16')}"
        config = make("task=classify", model, *OF_NO_WORDS, rows="\n".join(map(json.dumps, rows)))
        found = expect(prepare(config), (), measured=True)
        assert found.outlook is not None, found.planned.why
        assert "task classify" in found.outlook.forecast.step_seconds.why
        written.append(found.outlook.forecast.disk_bytes)
    assert written[1] - written[0] == 4 * 2 * (384 + 1)
