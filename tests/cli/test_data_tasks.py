"""Promises of `halfbyte data` for every task: rows are shown as the model gets them, with what they teach."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import Result

Call = Callable[..., Result]
ENCODER = "models/all-MiniLM-L6-v2-fp16"
TOLD = {
    "dpo": [{"prompt": f"Who {n}? ", "chosen": f"A cat {n}.", "rejected": "No dog."} for n in range(4)],
    "kto": [{"prompt": f"Who {n}? ", "completion": f"A cat {n}.", "label": n != 1} for n in range(4)],
    "classify": [{"text": f"a fine film {n}", "label": "good" if n else "bad"} for n in range(4)],
    "tag": [{"tokens": ["the", "red", f"door{n}"], "tags": ["O", "C", "O"]} for n in range(4)],
    "embed": [{"sentence1": f"one {n}", "sentence2": f"two {n}", "score": n / 4} for n in range(4)],
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(task: str) -> Path:
        file = tmp_path / f"{task}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in TOLD[task]), encoding="utf-8")
        return file

    return write


@pytest.mark.parametrize(
    ("task", "named", "said"),
    [
        (
            "dpo",
            "models/stories260K-hf",
            [r"better answer\n.*Who 1\? ⟦.*A cat 1\.", r"worse answer\n.*⟦.*No dog\."],
        ),
        ("kto", "models/stories260K-hf", [r"bad answer\n.*A cat 1\.", r"another row's answer.*\n.*Who 1\?"]),
        ("classify", ENCODER, [r"label good\n\[CLS\] ?a fine film 1"]),
        ("tag", ENCODER, [r"tags the O, red C, door O\n"]),
        ("embed", ENCODER, [r"text\n.*one 1", r"its partner, score 0\.25\n.*two 1"]),
    ],
)
def test_a_row_is_shown_with_what_it_teaches(
    call: Call,
    shared: Callable[[str], Path],
    written: Callable[[str], Path],
    task: str,
    named: str,
    said: list[str],
) -> None:
    rows = written(task)
    result = call("data", "show", rows, "--task", task, "--model", shared(named), "--row", 2)
    assert result.exit_code == 0, result.stderr
    assert all(re.search(pattern, result.stdout) for pattern in said), result.stdout
    assert f"{rows}:2 " in result.stdout
    assert f"{rows}:1 " not in result.stdout
    assert f"{rows}:3 " not in result.stdout
    refused = call("data", "show", rows, "--task", task, "--model", shared(named), "--row", 5)
    assert refused.exit_code == 2
    assert "at most 4, the number of rows" in refused.stderr


@pytest.mark.parametrize(
    ("task", "named", "objective"),
    [
        ("dpo", "models/stories260K-hf", "preference"),
        ("kto", "models/stories260K-hf", "kto"),
        ("classify", ENCODER, "classification"),
        ("tag", ENCODER, "tagging"),
        ("embed", ENCODER, "similarity"),
    ],
)
@pytest.mark.parametrize("way", ["--task", "--set"])
def test_a_check_counts_a_task_s_rows_in_tokens(
    call: Call,
    shared: Callable[[str], Path],
    written: Callable[[str], Path],
    task: str,
    named: str,
    objective: str,
    way: str,
) -> None:
    wish = (way, task if way == "--task" else f"task={task}")
    plain = json.loads(call("data", "check", written(task), *wish, "--json").stdout)
    counted = json.loads(
        call("data", "check", written(task), *wish, "--model", shared(named), "--json").stdout
    )
    assert (plain["objective"], plain["rows"], counted["rows"]) == (objective, 4, 4)
    assert counted["objective"] == objective
    assert counted["tokens"]["lengths"]["shortest"] > 2
    assert counted["tokens"]["passes"]["passes"] == 1
    assert counted["tokens"]["passes"]["rows_per_pass"] == 4


def test_the_balance_of_labels_is_shown(
    call: Call, shared: Callable[[str], Path], written: Callable[[str], Path]
) -> None:
    for more in ((), ("--model", shared(ENCODER))):
        shown = call("data", "check", written("classify"), "--task", "classify", *more).stdout
        assert re.search(
            r"^labels +(bad 1 \(25%\), good 3 \(75%\)|good 3 \(75%\), bad 1 \(25%\))$", shown, re.M
        )


def test_rows_for_another_task_are_refused(
    call: Call, shared: Callable[[str], Path], written: Callable[[str], Path]
) -> None:
    for more in ((), ("--model", shared(ENCODER))):
        refused = call("data", "check", written("dpo"), "--task", "classify", *more)
        assert refused.exit_code == 2
        assert "HB216" in refused.stderr
    refused = call("data", "show", written("dpo"), "--task", "chat", "--model", shared(ENCODER))
    assert refused.exit_code == 2
    assert "task" in refused.stderr


def test_images_are_shown_with_path_and_label(call: Call, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for label, count in (("cat", 3), ("dog", 1)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(count):
            pixels: Any = random.integers(0, 255, (12, 12, 3)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "set" / label / f"{number}.png")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**shape, image_size=12, patch_size=4)).save_pretrained(
        tmp_path / "model"
    )
    processor = {"image_processor_type": "ViTImageProcessor", "size": 12}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    task = ("--task", "classify_images")
    shown = call("data", "show", tmp_path / "set", *task, "--model", tmp_path / "model", "-n", 4).stdout
    for label, count in (("cat", 3), ("dog", 1)):
        for number in range(count):
            file = tmp_path / "set" / label / f"{number}.png"
            assert f"{file}   12 x 12 pixels, 10 tokens\nlabel {label}\n" in shown
    for more in ((), ("--model", tmp_path / "model")):
        counted = call("data", "check", tmp_path / "set", *task, *more).stdout
        assert re.search(r"^labels +cat 3 \(75%\), dog 1 \(25%\)$", counted, re.MULTILINE), counted
