"""A run that is cut anywhere and resumed ends in the very weights of one that never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from halfbyte.data.examples import Listed
from halfbyte.data.tokenise import Example
from halfbyte.errors import TrainError
from halfbyte.model.lora import LoraSpec, add_lora
from halfbyte.settings import TrainConfig
from halfbyte.train import adamw
from halfbyte.train.checkpoint import last_good
from halfbyte.train.display import Silent
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.metrics import StepRecord
from halfbyte.train.optimizer import OPTIMIZERS

Build = Callable[[], PreTrainedModel]
PACKED = TrainConfig(
    batch_tokens=40, gradient_accumulation_steps=2, epochs=3, learning_rate=1e-2, save_steps=2
)
PADDED = TrainConfig(
    packing=False,
    batch_size=2,
    gradient_accumulation_steps=3,
    epochs=3,
    learning_rate=1e-2,
    save_steps=2,
    weight_decay=0.1,
)


class _Cut(Silent):
    """Ends the run, as a crash would, when a step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def step(self, record: StepRecord) -> None:
        if record.step == self._step:
            raise ZeroDivisionError


def _adapted(model: PreTrainedModel) -> PreTrainedModel:
    add_lora(model, LoraSpec(r=4, dropout=0.3), seed=1)
    return model


def _whole(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _run(model: PreTrainedModel, folder: Path, cut: int | None = None) -> TrainRun:
    def save(target: Path) -> None:
        save_file(
            {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
            target / "weights.safetensors",
        )

    display = Silent() if cut is None else _Cut(cut)
    return TrainRun(folder, save, seed=3, display=display, resume=last_good(folder).checkpoint)


def _bits(model: PreTrainedModel) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad)


def _told(folder: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says that no clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    clocks = ("seconds", "tokens_per_s", "peak_rss_bytes")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.mark.parametrize("config", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", [_adapted, _whole], ids=["lora with dropout", "full"])
def test_a_run_cut_three_times_ends_in_the_same_bits(
    tiny_llama: Build,
    rows: list[Example],
    tmp_path: Path,
    config: TrainConfig,
    kind: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    whole = kind(tiny_llama())
    expected = train(whole, Listed(rows), config, _run(whole, tmp_path / "whole"))
    for cut in (1, 3, 5):  # before the first checkpoint, and one step after each of two
        model = kind(tiny_llama())
        with pytest.raises(ZeroDivisionError):
            train(model, Listed(rows), config, _run(model, tmp_path / "cut", cut))
    model = kind(tiny_llama())
    run = _run(model, tmp_path / "cut")
    assert run.resume is not None
    assert run.resume.state.step == 4
    result = train(model, Listed(rows), config, run)
    assert _bits(model) == _bits(whole)
    assert _told(tmp_path / "cut") == _told(tmp_path / "whole")
    assert (result.steps, result.tokens, result.trained_tokens, result.usage) == (
        expected.steps,
        expected.tokens,
        expected.trained_tokens,
        expected.usage,
    )
    assert (result.first_loss, result.last_loss) == (expected.first_loss, expected.last_loss)


def test_without_the_optimizer_s_state_the_weights_would_differ(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    whole, model = tiny_llama(), tiny_llama()
    train(whole, Listed(rows), PACKED, _run(whole, tmp_path / "whole"))
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), PACKED, _run(model, tmp_path / "cut", 3))
    model = tiny_llama()
    run = _run(model, tmp_path / "cut")
    assert run.resume is not None
    for name in [name for name in run.resume.tensors if name.startswith("optimizer/")]:
        del run.resume.tensors[name]  # type: ignore[attr-defined]
    train(model, Listed(rows), PACKED, run)
    assert _bits(model) != _bits(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 7},
        {"config": {"epochs": 4}},
        {"seed": 4},
    ],
    ids=["rows", "steps", "seed"],
)
def test_a_checkpoint_of_another_run_is_refused(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, change: dict[str, object]
) -> None:
    config = PADDED.model_copy(update={"max_steps": 6} if "rows" in change else {})
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), config, _run(model, tmp_path, 3))
    model = tiny_llama()
    run = _run(model, tmp_path)
    if "seed" in change:
        run = TrainRun(run.folder, run.save, seed=4, resume=run.resume)
    changed = config.model_copy(update=change.get("config", {}))
    with pytest.raises(TrainError, match="HB511"):
        train(model, Listed(rows[: change.get("rows", 8)]), changed, run)  # type: ignore[misc]


def test_a_checkpoint_of_other_parameters_is_refused_before_any_is_changed(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    model = _adapted(tiny_llama())
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), PADDED, _run(model, tmp_path, 3))
    other = tiny_llama()
    add_lora(other, LoraSpec(r=8), seed=1)
    before = _bits(other)
    with pytest.raises(TrainError, match="HB511"):
        train(other, Listed(rows), PADDED, _run(other, tmp_path))
    assert _bits(other) == before


def test_a_line_cut_off_by_a_crash_is_written_anew(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    whole, model = tiny_llama(), tiny_llama()
    train(whole, Listed(rows), PADDED, _run(whole, tmp_path / "whole"))
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), PADDED, _run(model, tmp_path / "cut", 3))
    with (tmp_path / "cut/metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "epo')
    model = tiny_llama()
    train(model, Listed(rows), PADDED, _run(model, tmp_path / "cut"))
    assert _told(tmp_path / "cut") == _told(tmp_path / "whole")


def test_only_the_newest_checkpoints_are_kept(tiny_llama: Build, rows: list[Example], tmp_path: Path) -> None:
    model = tiny_llama()
    config = PADDED.model_copy(update={"save_steps": 1, "save_total_limit": 2})
    train(model, Listed(rows), config, _run(model, tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_a_checkpoint_changes_nothing_of_the_run_that_writes_it(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    often, never = _adapted(tiny_llama()), _adapted(tiny_llama())
    train(often, Listed(rows), PACKED.model_copy(update={"save_steps": 1}), _run(often, tmp_path / "often"))
    train(
        never, Listed(rows), PACKED.model_copy(update={"save_steps": None}), _run(never, tmp_path / "never")
    )
    assert _bits(often) == _bits(never)
    assert not torch.equal(often.model.layers[0].mlp.up_proj.lora_B, torch.zeros(1))


class _Losses:
    """Held-out losses one after another, and which step each was measured after."""

    def __init__(self, *losses: float) -> None:
        self._left = list(losses)

    def __call__(self) -> float:
        return self._left.pop(0)


MEASURED = PADDED.model_copy(update={"save_steps": None, "eval_steps": 1, "epochs": 3})


def _measured(model: PreTrainedModel, folder: Path, losses: _Losses, cut: int | None = None) -> TrainRun:
    return replace(_run(model, folder, cut), held_out_loss=losses)


def test_the_best_weights_are_the_result_where_the_settings_say_so(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    seen: dict[int, bytes] = {}
    model, last = tiny_llama(), tiny_llama()

    class Seen(Silent):
        def step(self, record: StepRecord) -> None:
            seen[record.step] = _bits(model)

    config = MEASURED.model_copy(update={"keep": "best", "save_total_limit": 1, "save_steps": 1})
    run = replace(_measured(model, tmp_path / "best", _Losses(5, 3, 4, 2, 6, 2.5)), display=Seen())
    result = train(model, Listed(rows), config, run)
    assert (result.best_step, result.best_loss, result.steps) == (4, 2, 6)
    assert _bits(model) == seen[4]
    assert seen[4] != seen[6]
    kept = sorted(p.name for p in (tmp_path / "best/checkpoints").iterdir())
    assert kept == ["step-000004", "step-000005"]
    train(last, Listed(rows), MEASURED, _measured(last, tmp_path / "last", _Losses(5, 3, 4, 2, 6, 2.5)))
    assert _bits(last) == seen[6]
    assert [line["held_out_loss"] for line in _told(tmp_path / "last")] == [5, 3, 4, 2, 6, 2.5]


def test_training_ends_early_after_so_many_measurements_without_a_lower_loss(
    tiny_llama: Build, rows: list[Example], tmp_path: Path
) -> None:
    config = MEASURED.model_copy(update={"early_stopping_patience": 2})
    model = tiny_llama()
    result = train(model, Listed(rows), config, _measured(model, tmp_path, _Losses(5, 3, 3, 2.9, 2.9, 3)))
    assert (result.steps, result.best_step) == (6, 4)
    model = tiny_llama()
    result = train(model, Listed(rows), config, _measured(model, tmp_path / "early", _Losses(5, 3, 3, 4)))
    assert (result.steps, result.best_step) == (4, 2)


def test_a_resumed_run_remembers_its_best(tiny_llama: Build, rows: list[Example], tmp_path: Path) -> None:
    config = MEASURED.model_copy(update={"keep": "best", "save_steps": 2})
    whole, model = tiny_llama(), tiny_llama()
    train(whole, Listed(rows), config, _measured(whole, tmp_path / "whole", _Losses(5, 3, 4, 3.5, 6, 7)))
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), config, _measured(model, tmp_path / "cut", _Losses(5, 3, 4, 3.5, 6), 5))
    model = tiny_llama()
    result = train(model, Listed(rows), config, _measured(model, tmp_path / "cut", _Losses(6, 7)))
    assert (result.best_step, result.best_loss) == (2, 3)
    assert _bits(model) == _bits(whole)


@pytest.mark.parametrize("setting", [{"keep": "best"}, {"early_stopping_patience": 1}])
def test_what_needs_measurements_is_refused_without_them(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"train.eval_steps"):
        TrainConfig(**setting)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_with_its_state_and_the_noise_of_its_step(
    tiny_llama: Build, rows: list[Example], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "LEAST", 64)  # so that small states and pages are what is tested
    ways = {"optimizer": name, "neftune_alpha": 5.0, "lora_plus_ratio": 4.0, "schedule": "wsd"}
    config = TrainConfig.model_validate(PACKED.model_dump() | ways)
    whole = _adapted(tiny_llama())
    train(whole, Listed(rows), config, _run(whole, tmp_path / "whole"))
    model = _adapted(tiny_llama())
    with pytest.raises(ZeroDivisionError):
        train(model, Listed(rows), config, _run(model, tmp_path / "cut", 3))
    model = _adapted(tiny_llama())
    run = _run(model, tmp_path / "cut")
    assert run.resume is not None
    assert run.resume.state.step == 2
    train(model, Listed(rows), config, run)
    assert _bits(model) == _bits(whole)
    assert _told(tmp_path / "cut") == _told(tmp_path / "whole")
