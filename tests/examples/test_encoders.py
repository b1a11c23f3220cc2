"""The encoders' example rows are what their generator makes, and each recipe learns them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.config import load_config
from halfbyte.pipeline import run
from halfbyte.tasks.known import prepare

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "encoders"
GOALS = {"classify": ("accuracy", 0.9), "tag": ("tag_accuracy", 0.95), "embed": ("recall_at_1", 0.9)}


def test_the_committed_rows_are_what_the_seed_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.encoders.make_rows import make_rows

    for name, rows in make_rows().items():
        written = [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
        assert written == rows, name


@pytest.mark.parametrize("task", GOALS)
def test_a_recipe_cuts_no_row(shared: Callable[[str], Path], task: str) -> None:
    model = shared("models/all-MiniLM-L6-v2-fp16")
    prepared = prepare(load_config(FOLDER / f"{task}.yaml", [f"model={model}"]))
    assert prepared.rows.cut == (0, 0)
    assert prepared.count(prepared.rows.train) == 180


@pytest.mark.slow
@pytest.mark.parametrize(("task", "goal"), GOALS.items())
def test_a_recipe_learns_its_rows(
    shared: Callable[[str], Path], tmp_path: Path, task: str, goal: tuple[str, float]
) -> None:
    model = shared("models/all-MiniLM-L6-v2-fp16")
    config = load_config(FOLDER / f"{task}.yaml", [f"model={model}", f"output_dir={tmp_path / 'run'}"])
    changes = {change.name: change for change in run(config).summary.changes}
    metric, least = goal
    assert changes[metric].after.value >= least
    if task == "embed":  # this model is an embedder, and finds nearly all of these rows before it is tuned
        assert changes[metric].verdict != "worse"
        assert changes[metric].after.value >= changes[metric].before.value
    else:
        assert changes[metric].verdict == "better"
