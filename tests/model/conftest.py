"""What the tests of models share: small models written to a folder, and one thread."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Shared = Callable[[str], Path]
Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]
EditedCopy = Callable[[Path, Edit], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def stories(shared: Shared) -> Path:
    """The smallest real Llama."""
    return shared("models/stories260K-hf")


@pytest.fixture
def edited_copy(tmp_path: Path) -> EditedCopy:
    """Copies a model folder with its tensors and its config changed by a function."""

    def copy(source: Path, edit: Edit) -> Path:
        target = Path(tempfile.mkdtemp(dir=tmp_path))
        for file in source.iterdir():
            shutil.copyfile(file, target / file.name)
        if (facts := target / "halfbyte.json").exists():  # who edits a file takes new digests, or none
            facts.write_text(json.dumps({"base": json.loads(facts.read_text())["base"]}))
        tensors = load_file(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        edit(tensors, config)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors"
        )
        (target / "config.json").write_text(json.dumps(config))
        return target

    return copy
