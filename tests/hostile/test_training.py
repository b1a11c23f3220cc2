"""Silent failures of training, each planted in a whole run through the command line or the pipeline, and seen.

`pytest -k hostile -v` lists the table; the number is the failure's in the project's list of them: packed samples that
see each other (5), accumulation that differs from a larger batch (6), a resume that replays or loses (7), memory that
does not suffice for the longest rows (11), numbers that are not finite (15), rows on both sides of an evaluation
(21).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.config import load_config
from halfbyte.data.pack import collate
from halfbyte.errors import DataError, ModelError, TrainError
from halfbyte.kernels.loss import HeadLoss
from halfbyte.model.loading import load
from halfbyte.pipeline import run
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare
from halfbyte.train import step
from halfbyte.train.step import RowNames, accumulate, trained_tokens

Shared = Callable[[str], Path]
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture
def settings(tmp_path: Path, shared: Shared) -> dict[str, Any]:
    """A run of a few seconds on real instruction rows of very different lengths."""
    torch.set_num_threads(1)
    rows = json.loads(shared("datasets/alpaca/alpaca_en_demo.json").read_text(encoding="utf-8"))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row for row in rows if len(json.dumps(row)) < 400][:48]), encoding="utf-8")
    return {
        "model": str(shared("models/stories260K-hf")),
        "output_dir": str(tmp_path / "run"),
        "dtype": "float32",
        "lora": {"r": 4, "dropout": 0.1},
        "data": {"train": str(file), "eval_fraction": 0.25},
        "train": {"batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "save_steps": 2},
    }


def _config(settings: dict[str, Any], *overrides: str) -> Config:
    return load_config(None, overrides, settings)


def test_hostile_5_packed_rows_that_see_each_other_stop_the_run(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.model import isolation

    right = isolation.model_inputs

    def without_bounds(*args: Any) -> dict[str, Any]:
        told = right(*args)
        if "cu_seq_lens_q" not in told:
            return told
        positions = torch.arange(told["input_ids"].shape[1])[None]
        return {"input_ids": told["input_ids"], "position_ids": positions, "use_cache": False}

    monkeypatch.setattr(isolation, "model_inputs", without_bounds)
    with pytest.raises(ModelError, match="HB317.*when the rows before it change"):
        run(_config(settings))
    assert not (Path(settings["output_dir"]) / "metrics.jsonl").exists()


def test_hostile_6_micro_batches_of_unequal_rows_have_the_gradient_of_one_batch(
    settings: dict[str, Any],
) -> None:
    config = _config(settings)
    rows = sorted(prepare(config).rows.train, key=lambda e: len(e.input_ids))[::4][:8]
    assert len(rows[-1].input_ids) > 2 * len(rows[0].input_ids)
    names = RowNames()

    def gradient(size: int, divide: Callable[[int, int], int]) -> Tensor:
        model = load(config.model, quantization=None, dtype=torch.float32)
        batches = [collate(rows[begin : begin + size], 0) for begin in range(0, 8, size)]
        whole = trained_tokens(batches, names)
        for batch in batches:
            accumulate(model, batch, divide(whole, batch.trained_tokens * len(batches)), names)
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one = gradient(8, lambda whole, own: whole)
    for size in (1, 4):
        assert (gradient(size, lambda whole, own: whole) - one).abs().max() <= 1e-6
        # The fault elsewhere: the mean of the micro-batches' means.
        assert (gradient(size, lambda whole, own: own) - one).abs().max() > 1e-4


def _train(settings: dict[str, Any], folder: Path, *options: str) -> subprocess.Popen[bytes]:
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(json.dumps(settings | {"output_dir": str(folder)}), encoding="utf-8")
    command = [sys.executable, "-m", "halfbyte", "train", str(recipe), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_hostile_7_a_run_killed_while_it_trains_is_resumed_to_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = _train(settings, whole)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    process = _train(settings, killed)
    deadline = time.monotonic() + 60
    while not (killed / "checkpoints/step-000004").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "adapter").exists()
    process = _train(settings, killed, "--resume")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert b"Going on after step" in said
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


SCARCE = """
import json, resource, sys
import torch
from halfbyte.config import load_config
from halfbyte.pipeline import run
from halfbyte.report.watch import Watch
torch.set_num_threads(1)

class Scarce(Watch):
    def training(self, log_steps):  # all is loaded and measured: from here on there are 160 MB more
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 160_000_000, resource.RLIM_INFINITY))
        return super().training(log_steps)

run(load_config(None, (), json.loads(sys.argv[1])), evaluate=False, watch=Scarce())
"""


def test_hostile_11_the_first_long_batch_takes_too_much_memory(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Few rows are long and an epoch may end before they meet; the run ends before its first step, not at theirs."""
    rows = json.loads(Path(settings["data"]["train"]).read_text(encoding="utf-8"))
    many = [row | {"instruction": f"{n}: {row['instruction']}"} for n in range(16) for row in rows]
    for number, row in enumerate(many[:32]):
        row["output"] = f"{number} " + "so it was, and so it is. " * 60
    Path(settings["data"]["train"]).write_text(json.dumps(many), encoding="utf-8")
    settings["data"] |= {"eval_fraction": 0.0, "max_truncated": 1.0}
    settings["train"] |= {"batch_size": 32, "packing": False, "activation_memory_gb": 100}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}

    def attempt() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCARCE, json.dumps(settings)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    refused = attempt()
    assert refused.returncode != 0
    assert "HB513" in refused.stderr
    assert "a step on the largest batch, 16,384 tokens in 32 rows" in refused.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    settings["train"] |= {"batch_size": 2, "gradient_accumulation_steps": 16}
    settings["output_dir"] = str(tmp_path / "smaller")
    assert attempt().returncode == 0  # as the error advises


def test_hostile_15_a_number_that_is_not_finite_stops_the_run_with_its_rows_and_a_checkpoint(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.batch_loss
    passes = 0

    def overflowing(*args: Any) -> HeadLoss:
        nonlocal passes
        passes += 1
        found = right(*args)
        return (
            found._replace(objective=found.objective * float("inf")) if passes == 5 else found
        )  # 1 is the trial

    monkeypatch.setattr(step, "batch_loss", overflowing)
    settings["forecast"] = False  # which takes a pass of its own
    with pytest.raises(
        TrainError, match=r"HB501[\s\S]*step 4 of 12, rows [0-9a-f]{16} \(.*rows.json:"
    ) as caught:
        run(_config(settings, "train.save_steps=null"), evaluate=False)
    folder = Path(settings["output_dir"])
    assert str(folder / "checkpoints" / "step-000003") in caught.value.fix
    monkeypatch.undo()
    assert (
        run(_config(settings, "train.save_steps=null"), evaluate=False, resume=True).summary.training.steps
        == 12
    )


def test_hostile_21_rows_on_both_sides_of_an_evaluation_stop_the_run(settings: dict[str, Any]) -> None:
    rows = json.loads(Path(settings["data"]["train"]).read_text(encoding="utf-8"))
    held_out = Path(settings["data"]["train"]).with_name("held-out.json")
    other = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    held_out.write_text(json.dumps([other, rows[7]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"HB205[\s\S]*held-out.json:1 equals .*rows.json:1"):
        run(_config(settings, f"data.eval={held_out}"))
