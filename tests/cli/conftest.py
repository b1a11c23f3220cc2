"""The command, called in this process, and a model with rows for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from halfbyte.cli.app import app

Call = Callable[..., Result]


@pytest.fixture
def call() -> Call:
    """Calls `halfbyte` with some arguments; stdout, stderr and exit code are in the result."""
    torch.set_num_threads(1)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def model(shared: Callable[[str], Path]) -> Path:
    """A real model small enough to train in a second."""
    return shared("models/stories260K-hf")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixteen prompts with short answers, [brackets] among them."""
    file = tmp_path / "rows.jsonl"
    names = ("cat", "dog", "bird", "fish")
    lines = [{"prompt": f"The {a} [big]", "completion": f" saw the {b}."} for a in names for b in names]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def recipe(tmp_path: Path, model: Path, rows: Path) -> Path:
    """A recipe for these rows."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {model}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "dtype: float32\n"
        "lora: {r: 4}\n"
        f"data: {{train: {rows.name}, eval_fraction: 0.25}}\n"
        "train: {batch_size: 4, learning_rate: 1e-2}\n"
        "evaluate: {max_new_tokens: 4, bootstrap: 200, samples: 2}\n",
        encoding="utf-8",
    )
    return file
