"""Every run leaves what it took, however it ends, and the numbers are those of its own files and of the system."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import statistics
import time
from pathlib import Path

import pytest
import torch
from tests.plan.machines import write_status
from tests.short_runs import Make, Shared, read_json, read_lines, settings_in

from halfbyte import __version__
from halfbyte.errors import TrainError
from halfbyte.model import residency
from halfbyte.model.loading import load
from halfbyte.model.saving import save_quantized
from halfbyte.pipeline import run
from halfbyte.plan.ledger import Ledger, Planned, read_ledger, read_plan
from halfbyte.plan.recorder import MemoryWatch, Recorder
from halfbyte.quant.weight import QuantSpec
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.train.display import Display, Silent
from halfbyte.train.interrupt import TrainInterrupted
from halfbyte.train.metrics import StepRecord

MIB = 2**20


@pytest.fixture
def make(tmp_path: Path, shared: Shared) -> Make:
    """Builds the settings of a run that takes about a second."""
    return settings_in(tmp_path, shared)


def ledger_of(folder: Path) -> Ledger:
    found = read_ledger(folder)
    assert isinstance(found, Ledger), found
    return found


def test_a_run_leaves_what_it_took(make: Make) -> None:
    config = make("cost.country=FR", "cost.machine_watts=50")
    began = time.perf_counter()
    result = run(config)
    wall = time.perf_counter() - began
    took = ledger_of(result.folder)
    steps = read_lines(result.folder / "metrics.jsonl")
    assert (took.state, took.error, took.steps) == ("done", "", 12)
    assert took.tokens == sum(step["tokens"] for step in steps) == result.summary.training.tokens
    seconds = [step["tokens"] / step["tokens_per_s"] for step in steps]
    assert took.step_seconds == statistics.median(seconds[1:])
    assert 0 < took.training_seconds <= took.seconds <= wall
    assert took.energy.mid == pytest.approx(50 * took.seconds / 3600)
    assert took.co2.mid == pytest.approx((took.energy.mid or 0) / 1000 * 56)
    assert took.cost.unit == "EUR"
    assert took.settings_sha256 == hashlib.sha256(config.to_yaml().encode()).hexdigest()
    assert took.versions["torch"] == torch.__version__
    assert took.versions["halfbyte"] == __version__
    assert took.machine["cores"] == len(os.sched_getaffinity(0))
    assert read_plan(result.folder) == Planned(None, why="the settings have forecast: false")
    shown = read_json(result.folder / "summary.json")["took"]
    assert shown["energy"]["mid"] == took.energy.mid
    assert shown["differences"] == []


def test_the_parts_of_memory_are_the_weights_bytes(make: Make) -> None:
    result = run(make("train.max_steps=1"), evaluate=False)
    took, setting = ledger_of(result.folder), result.summary.setting
    assert took.parts["adapters"] == 4 * setting.trainable_parameters
    assert took.parts["base"] + took.parts["adapters"] == setting.weight_bytes


def test_a_streamed_base_is_not_counted_as_if_it_were_in_memory(
    make: Make, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "LEAST_BYTES", 64)
    loaded = load(shared("models/stories260K-hf"), quantization=QuantSpec(), dtype=torch.float32)
    save_quantized(loaded, tmp_path / "nf4")
    config = make(f"model={tmp_path / 'nf4'}", "residency=streamed", "train.max_steps=1")
    assert ledger_of(run(config, evaluate=False).folder).parts.keys() == {"adapters"}


def test_the_peak_is_the_system_s_and_its_parts_are_what_was_held(tmp_path: Path) -> None:
    watch = MemoryWatch()
    held = torch.ones(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 4 + 64 * MIB // 4)
    watch.look()
    del held
    peak = watch.peak()
    assert peak.method.startswith("VmHWM")
    assert peak.nbytes is not None
    assert peak.anon is not None
    assert peak.anon >= 64 * MIB
    sampled = (peak.anon or 0) + (peak.file or 0) + (peak.shmem or 0)
    assert sampled == pytest.approx(peak.nbytes, rel=0.02)


def test_a_peak_from_before_is_not_taken_for_the_run_s(tmp_path: Path) -> None:
    write_status(tmp_path, hwm=900, rss=200, anon=150, file=50)
    watch = MemoryWatch(tmp_path)
    write_status(tmp_path, hwm=900, rss=400, anon=300, file=100)
    watch.look()
    write_status(tmp_path, hwm=900, rss=250, anon=200, file=50)
    peak = watch.peak()
    assert (peak.nbytes, peak.anon, peak.file, peak.shmem) == (400 * MIB, 300 * MIB, 100 * MIB, 0)
    assert "had held more before" in peak.method
    write_status(tmp_path, hwm=950, rss=250, anon=200, file=50)
    assert watch.peak().nbytes == 950 * MIB


def test_a_system_that_does_not_say_leaves_the_peak_unknown(tmp_path: Path) -> None:
    assert MemoryWatch(tmp_path).peak().nbytes is None


class _At(Watch):
    """Does something when a step is done."""

    def __init__(self, step: int, what: type[BaseException] | int) -> None:
        super().__init__()
        self.at, self.what = step, what

    def training(self, every: int) -> Display:
        outer = self

        class Acts(Silent):
            def step(self, record: StepRecord) -> None:
                if record.step != outer.at:
                    return
                if isinstance(outer.what, int):
                    os.kill(os.getpid(), outer.what)
                else:
                    raise outer.what("so it goes")

        return Acts()


def test_an_interrupted_run_says_what_it_took_until_then_and_keeps_that_when_it_goes_on(make: Make) -> None:
    config = make()
    with pytest.raises(TrainInterrupted, match="HB503"):
        run(config, watch=_At(5, signal.SIGINT))
    folder = Path(config.output_dir)
    before = ledger_of(folder)
    assert (before.state, before.error, before.steps) == ("interrupted", "HB503", 5)
    assert before.step_seconds is not None
    after = ledger_of(run(config, resume=True).folder)
    assert (after.state, after.resumed_after, after.steps) == ("done", 5, 7)
    assert [each["steps"] for each in after.earlier] == [5]
    tokens = sum(step["tokens"] for step in read_lines(folder / "metrics.jsonl"))
    assert after.tokens + before.tokens == tokens


@pytest.mark.parametrize(
    ("error", "state"), [(MemoryError, "failed"), (OSError, "failed"), (KeyboardInterrupt, "interrupted")]
)
def test_a_run_that_broke_says_what_it_took_until_then(
    make: Make, error: type[BaseException], state: str
) -> None:
    config = make()
    with pytest.raises(error):
        run(config, watch=_At(1, error))
    took = ledger_of(Path(config.output_dir))
    assert (took.state, took.error, took.steps) == (state, error.__name__, 1)
    assert took.step_seconds is None  # one step is none to take a median of
    assert took.seconds > 0


def test_a_run_that_diverged_names_its_code(make: Make) -> None:
    config = make("train.learning_rate=1e30", "train.max_grad_norm=null", "train.warmup_steps=0")
    with pytest.raises(TrainError) as caught:
        run(config, evaluate=False)
    took = ledger_of(Path(config.output_dir))
    assert (took.state, took.error) == ("failed", caught.value.code)


def _recorder(folder: Path, config: Config, root: Path = Path("/")) -> Recorder:
    def refuse(name: str, content: object) -> None:
        raise OSError(28, "No space left on device")

    return Recorder(folder, config, {"processor": "x", "cores": 1}, {}, refuse, root=root)


def test_a_disk_that_is_full_does_not_hide_what_stopped_the_run(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, _recorder(tmp_path, make()):
        raise ZeroDivisionError
    assert any("No space left on device" in note for note in caught.value.__notes__)
    with pytest.raises(OSError, match="No space left"), _recorder(tmp_path, make()) as recorder:
        recorder.finish()


def test_bytes_written_are_the_system_s_or_unknown(make: Make, tmp_path: Path) -> None:
    written: list[dict[str, object]] = []
    root, folder = tmp_path / "root", tmp_path / "left"
    folder.mkdir()
    (folder / "adapter").write_bytes(b"x" * 100)
    write_status(root, hwm=9, rss=9, anon=9, file=0)
    io = root / "proc/self/io"

    def took(before: str | None, after: str | None) -> object:
        for text in (before, after):
            if text is None:
                io.unlink(missing_ok=True)
            else:
                io.write_text(f"rchar: 7\nwrite_bytes: {text}\n", encoding="ascii")
            if text is before:
                recorder = Recorder(
                    folder, make(), {}, {}, lambda name, content: written.append(dict(content)), root=root
                )
                recorder.__enter__()
        recorder.finish()
        return written[-1]["written_bytes"]

    assert took("1000", "5096") == 4096
    assert took("1000", "1000 ") is None  # the folder is there: its file system does not count
    assert took(None, "7") is None
