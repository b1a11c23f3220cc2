"""Promises of a run whose base stays in its file."""

from __future__ import annotations

import io
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
from halfbyte.quant.weight import QuantSpec
from halfbyte.report.watch import Watch
from halfbyte.train.methods import chosen_residency


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


def test_auto_streams_a_base_that_memory_would_not_hold(make: Make) -> None:
    assert chosen_residency(make()) == "resident"
    assert chosen_residency(make("memory_gb=0.01")) == "streamed"
    assert chosen_residency(make("memory_gb=0.01", "residency=resident")) == "resident"
    assert chosen_residency(make("memory_gb=0.01", "method=full")) is None


def test_auto_does_not_stream_what_is_quantised_on_the_way(make: Make, shared: Shared) -> None:
    assert chosen_residency(make("memory_gb=0.01", f"model={shared('models/base-11m')}")) == "resident"


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_that_changes_the_base_is_refused_on_a_streamed_one(init: str, make: Make) -> None:
    with pytest.raises(ModelError) as fault:
        run(make("residency=streamed", f"lora.init={init}"))
    assert fault.value.code == "HB370"
