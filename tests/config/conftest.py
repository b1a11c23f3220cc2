"""Files of other tools, with a model and rows that are really there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = Path(__file__).parent
Copy = Callable[[str], Path]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with rows in Alpaca's columns, and as conversations."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("train.json", 40), ("eval.json", 6)):
        rows = [
            {"instruction": f"Count {name} to {i}.", "input": "", "output": f"I am at {i}."}
            for i in range(count)
        ]
        (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    talks = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(20)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def copy(desk: Path, shared: Callable[[str], Path]) -> Copy:
    """Copies a file of another tool into the working folder, its model and data sets replaced by local ones."""
    (desk / "model").symlink_to(shared("models/base-11m"), target_is_directory=True)
    listed = {"alpaca_en_demo": {"file_name": "train.json"}, "identity": {"file_name": "eval.json"}}
    (desk / "data").mkdir()
    for name in ("train.json", "eval.json"):
        (desk / "data" / name).write_bytes((desk / name).read_bytes())
    (desk / "data" / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")

    def make(name: str) -> Path:
        text = (FILES / name).read_text(encoding="utf-8")
        for model in ("example-org/base-8b-instruct", "example-org/base-8b", "example-org/base-1b"):
            text = text.replace(model, "model")
        text = text.replace("example-org/alpaca", "train.json").replace(
            "example-org/conversations", "talks.jsonl"
        )
        # A format of the model that was replaced; this one has chatml's tokens.
        text = text.replace("template: llama3\n", "template: chatml\n")
        file = desk / Path(name).name
        file.write_text(text, encoding="utf-8")
        return file

    return make
