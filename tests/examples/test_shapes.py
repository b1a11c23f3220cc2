"""The shapes example: drawn the same each time, and its recipes are in order before a weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers.utils import logging

from halfbyte.config import load_config
from halfbyte.data.images.read import ImageReport, read_images
from halfbyte.pipeline import rehearse

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The example as it stands in a repository, its images drawn, and its base as if it had been trained."""
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.shapes.make_images import make

    logging.disable_progress_bar()
    made = tmp_path / "build" / "shapes"
    make(made)
    shutil.copytree(made / "start", made / "base" / "model")
    shutil.copytree(ROOT / "examples" / "shapes", tmp_path / "examples" / "shapes")
    return tmp_path / "examples" / "shapes"


def test_the_recipes_fit_the_images_and_the_model(shapes: Path, tmp_path: Path) -> None:
    for name, rows in (("pretrain.yaml", 2000), ("recipe.yaml", 1000)):
        config = load_config(shapes / name, [f"output_dir={tmp_path / 'run'}"])
        found = rehearse(config)
        task, plan = found.task, found.plan
        assert len(task.rows.train) + len(task.rows.held_out) == rows
        assert plan.total_steps > 100


def test_every_picture_is_a_different_one_and_none_lies_on_both_sides(shapes: Path) -> None:
    made = shapes.parents[1] / "build" / "shapes"
    upright, turned = read_images(made / "upright"), read_images(made / "turned")
    assert ImageReport.of([*upright, *turned]).duplicates == 0
    assert set(ImageReport.of(upright).labels.values()) == {250}


def test_the_same_seed_draws_the_same_pictures(shapes: Path, tmp_path: Path) -> None:
    from examples.shapes.make_images import make

    make(tmp_path / "again")
    made = shapes.parents[1] / "build" / "shapes"
    first = [row.id for row in read_images(made / "turned")]
    assert [row.id for row in read_images(tmp_path / "again" / "turned")] == first
