"""Settings of short runs of a real encoder, and of tiny ones of other families with its tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from halfbyte.config import load_config
from halfbyte.pipeline import run
from halfbyte.settings import Config

SMALL: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attention_probs_dropout_prob": 0.1,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
Make = Callable[..., Config]


@pytest.fixture(scope="session")
def encoder(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a real encoder, or of a tiny one of another family with the same tokenizer."""
    made: dict[str, Path] = {"bert": shared("models/all-MiniLM-L6-v2-fp16")}

    def build(family: str = "bert") -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **SMALL)
            AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
            for name in TOKENIZER:
                shutil.copy(shared("models/all-MiniLM-L6-v2-fp16") / name, folder / name)
        return made[family]

    return build


@pytest.fixture
def make(tmp_path: Path, encoder: Callable[[str], Path]) -> Make:
    """Builds the settings of a run that takes a few seconds."""
    torch.set_num_threads(1)

    def build(task: str, train: str, *overrides: str, family: str = "bert", held_out: str = "") -> Config:
        data: dict[str, Any] = {"max_length": 32, "eval_fraction": 0.25}
        for name, rows in (("train", train), ("eval", held_out)):
            if rows:
                (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
                data[name] = str(tmp_path / f"{name}.jsonl")
        base: dict[str, Any] = {
            "model": str(encoder(family)),
            "task": task,
            "output_dir": str(tmp_path / "run"),
            "forecast": False,
            "dtype": "float32",
            "lora": {"r": 4},
            "data": data,
            "train": {"batch_size": 8, "epochs": 3, "learning_rate": 2e-3},
            "evaluate": {"bootstrap": 200},
        }
        return load_config(None, overrides, base)

    return build


@pytest.fixture
def resumes_to_the_same_bits() -> Callable[[Config], None]:
    """Runs to the end, goes back to the checkpoint before the last, and goes on from there."""

    def check(config: Config) -> None:
        whole = run(config, evaluate=False)
        expected = load_file(whole.result / "adapter_model.safetensors")
        checkpoints = sorted((whole.folder / "checkpoints").iterdir())
        assert len(checkpoints) > 1
        shutil.rmtree(checkpoints[-1])
        shutil.rmtree(whole.result)
        (whole.folder / "summary.json").unlink()
        again = run(config, evaluate=False, resume=True)
        found = load_file(again.result / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    return check
