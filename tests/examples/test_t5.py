"""The example of an encoder-decoder: made the same each time, and its two recipes learn their rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from halfbyte.config import load_config
from halfbyte.pipeline import rehearse, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The example as it stands in a repository, its rows made, and its base as if it had been trained."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    from examples.t5.make_base import make

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    made = tmp_path / "build" / "t5"
    make(made)
    shutil.copytree(made / "start", made / "base" / "model")
    shutil.copytree(ROOT / "examples" / "t5", tmp_path / "examples" / "t5")
    return tmp_path / "examples" / "t5"


def test_the_recipes_cut_no_row_and_every_answer_comes_back(example: Path) -> None:
    for name, count in (("pretrain.yaml", 4000), ("recipe.yaml", 800)):
        task = rehearse(load_config(example / name, ["output_dir=tried"])).task
        assert len(task.rows.train) + len(task.rows.held_out) == count
        assert task.rows.cut == (0, 0)
        assert [note for note in task.notes() if "padded" not in note] == []


def test_the_same_seed_makes_the_same_rows_and_model(example: Path, tmp_path: Path) -> None:
    from examples.t5.make_base import make

    make(tmp_path / "again")
    made = example.parents[1] / "build" / "t5"
    for name in ("short.jsonl", "file.jsonl", "start/model.safetensors", "start/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.slow
def test_both_runs_learn_their_rows(example: Path) -> None:
    shutil.rmtree(example.parents[1] / "build" / "t5" / "base")
    for name in ("pretrain.yaml", "recipe.yaml"):
        result = run(load_config(example / name))
        summary = json.loads((result.folder / "summary.json").read_text())
        changed = summary["metrics"]["exact_match"]
        assert changed["after"]["value"] > 0.9 > changed["before"]["value"]
        assert changed["verdict"] == "better"
