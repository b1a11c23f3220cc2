"""Settings of runs that take about a second, and how their files are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from halfbyte.config import load_config
from halfbyte.settings import Config

Make = Callable[..., Config]
Shared = Callable[[str], Path]
ANIMALS = ("cat", "dog", "bird", "fish", "bear", "duck", "frog", "bug")
VARIED = ("lora.init=pissa", "lora.init_iterations=2", "lora.dora=true", "lora.rank_pattern={q_proj: 2}")


def rows_of(count: int, blank: str = " ") -> str:
    """Short prompts with short answers; the blank between them may stand on either side."""
    rows = []
    for number in range(count):
        animal, tail = ANIMALS[number % 8], f"ran to the {ANIMALS[number // 8]}."
        rows.append({"prompt": f"The {animal}" + (" " if not blank else ""), "completion": blank + tail})
    return "\n".join(map(json.dumps, rows)) + "\n"


def settings_in(folder: Path, shared: Shared) -> Make:
    """What builds the settings of such a run, its rows and what it leaves in a folder."""
    torch.set_num_threads(1)

    def build(*overrides: str, rows: str | None = None) -> Config:
        file = folder / "rows.jsonl"
        file.write_text(rows_of(32) if rows is None else rows, encoding="utf-8")
        base: dict[str, Any] = {
            "model": str(shared("models/stories260K-hf")),
            "output_dir": str(folder / "run"),
            "dtype": "float32",
            "forecast": False,
            "lora": {"r": 4},
            "data": {"train": str(file), "eval_fraction": 0.25},
            "train": {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2},
            "evaluate": {"max_new_tokens": 6, "max_items": 4, "bootstrap": 200},
        }
        return load_config(None, overrides, base)

    return build


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
