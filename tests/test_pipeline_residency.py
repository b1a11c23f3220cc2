"""Promises of a run whose base stays in its file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.short_runs import Make, Shared, read_json, read_lines, settings_in

from halfbyte.errors import ModelError
from halfbyte.model.loading import load
from halfbyte.model.saving import save_quantized
from halfbyte.pipeline import run
from halfbyte.plan.expect import expect, machine_here, where_to_measure
from halfbyte.plan.forecast import Machine
from halfbyte.plan.memory import Runtime
from halfbyte.quant.weight import QuantSpec
from halfbyte.report.watch import Watch
from halfbyte.tasks.known import prepare


@pytest.fixture
def make(tmp_path: Path, shared: Shared) -> Make:
    """Builds the settings of a run of a few steps on a 4-bit folder whose layers are large enough to be streamed."""
    folder = tmp_path / "nf4"
    save_quantized(load(shared("models/base-11m"), quantization=QuantSpec(), dtype=torch.float32), folder)
    build = settings_in(tmp_path, shared)
    return lambda *overrides, **more: build(f"model={folder}", "train.max_steps=3", *overrides, **more)


def test_a_streamed_base_gives_the_adapter_that_a_resident_one_gives(make: Make, tmp_path: Path) -> None:
    printed = io.StringIO()
    found = {}
    for how in ("resident", "streamed"):
        watch = Watch(Console(file=printed, width=200))
        result = run(make(f"residency={how}", f"output_dir={tmp_path / how}"), watch=watch)
        found[how] = load_file(result.result / "adapter_model.safetensors")
        losses = read_json(result.folder / "summary.json")["training"]["last_loss"]
        found[how]["loss"] = torch.tensor(losses, dtype=torch.float64)
    assert found["resident"].keys() == found["streamed"].keys()
    assert all(torch.equal(found["resident"][name], found["streamed"][name]) for name in found["resident"])
    (streamed,) = [e for e in read_lines(tmp_path / "streamed" / "events.jsonl") if e["event"] == "streamed"]
    assert streamed["visits"] > 0
    assert streamed["brought_bytes"] > 0
    assert streamed["waited_seconds"] >= 0
    assert "the base is in memory" in printed.getvalue()
    assert "the base is streamed: two layers of" in printed.getvalue()


def test_auto_streams_a_base_whose_forecast_is_beyond_what_may_be_taken(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base takes about 8 MB more where it is resident: a limit between the two decides."""
    task = prepare(make("forecast=true", "train.activation_memory_gb=0.05"))
    here = machine_here(task.config, ())
    given = replace(here, memory_bytes=10**12, runtime=Runtime(0, 3 * 10**8, 0), runtime_method="given")

    def on(machine: Machine) -> None:
        monkeypatch.setattr("halfbyte.plan.expect.machine_here", lambda *_: machine)

    on(given)
    resident = expect(task, (), measured=False)
    assert resident.residency == "resident"
    assert resident.outlook is not None
    took = resident.outlook.forecast.peak_bytes
    for room, chosen in ((took + 10**6, "resident"), (took - 10**6, "streamed")):
        on(replace(given, memory_bytes=room))
        found = expect(task, (), measured=False)
        assert found.residency == chosen
        assert f"the base is {chosen}" in found.because


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        (("residency=resident",), "resident"),
        (("residency=streamed",), "streamed"),
        (("method=full", "model={plain}"), None),
        (("model={plain}",), "resident"),
        (("lora.init=pissa",), "resident"),
        (("forecast=false",), "resident"),
    ],
)
def test_what_has_no_choice_is_not_decided(
    make: Make, shared: Shared, settings: tuple[str, ...], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for nothing, auto would stream what can be streamed."""
    told = [each.format(plain=shared("models/base-11m")) for each in settings]
    task = prepare(make("forecast=true", *told))
    machine = replace(machine_here(task.config, ()), memory_bytes=0)
    monkeypatch.setattr("halfbyte.plan.expect.machine_here", lambda *_: machine)
    found = expect(task, (), measured=False)
    assert found.residency == chosen
    assert found.because == ""


def test_a_model_is_measured_where_it_fits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    task = prepare(make("forecast=true"), held_out_only=True)
    assert where_to_measure(task) == "resident"
    machine = replace(machine_here(task.config, ()), memory_bytes=0)
    monkeypatch.setattr("halfbyte.plan.expect.machine_here", lambda *_: machine)
    assert where_to_measure(task) == "streamed"


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_that_changes_the_base_is_refused_on_a_streamed_one(init: str, make: Make) -> None:
    with pytest.raises(ModelError) as fault:
        run(make("residency=streamed", f"lora.init={init}"))
    assert fault.value.code == "HB370"
