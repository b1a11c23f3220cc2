"""What a training process takes without a model: measured on a real one, in a process of its own.

It owns that process and the tiny model it trains; it must not know how a forecast uses the measure.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.config import load_config
from halfbyte.data.pack import pack
from halfbyte.data.tokenise import Example
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import PlanError
from halfbyte.model.files import CONFIG, read_json
from halfbyte.plan.memory import Runtime, peak_of
from halfbyte.plan.work import Largest

if TYPE_CHECKING:
    from halfbyte.settings import Config

TOKENS = 32
ROWS = 16
LONGEST_S = 300.0
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json")
_WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "it", "was", "warm"]
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}

_SCRIPT = """
import json, sys
from pathlib import Path
import halfbyte.pipeline as pipeline
from halfbyte.cli.app import call
from halfbyte.train.metrics import peak_rss_bytes
told, inner = {"prepare": 0}, pipeline.train
def train(*given):
    told["prepare"] = peak_rss_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    done = inner(*given)
    told["train"] = peak_rss_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return done
pipeline.train = train
try:
    call(sys.argv[2:])
finally:
    told["close"] = peak_rss_bytes()
    Path(sys.argv[1]).write_text(json.dumps(told))
"""


def measure_runtime(model: Path | None) -> Runtime:
    """Train a tiny model for a few steps as `halfbyte train` does.

    Args:
        model: Folder whose tokenizer is used; None, or a folder without one, takes a small one.

    Raises:
        PlanError: HB701 where that process fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_model(folder / "model", model)
        rows = [{"text": " ".join([*_WORDS * TOKENS, str(row)])} for row in range(ROWS)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        settings = _settings(folder)
        (folder / "recipe.yaml").write_text(settings.to_yaml(), encoding="utf-8")
        told = _run(folder)
        example = Example(np.zeros(TOKENS, np.int32), np.ones(TOKENS, bool), None, None, "", "", False)
        nothing = Runtime(0, 0, 0)
        tiny = peak_of(
            settings,
            Largest(pack([example])),
            runtime=nothing,
            room=lambda *_: 10**9,
            residency="resident",
        )
    return Runtime(
        told["prepare"],
        told["train"] - max(tiny.phases[phase] for phase in ("backward", "loss", "optimizer")),
        told["close"] - tiny.phases["close"],
    )


def _settings(folder: Path) -> Config:
    base = {
        "model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "data": {
            "train": str(folder / "rows.jsonl"),
            "max_length": TOKENS,
            "max_truncated": 1.0,
            "eval_fraction": 0.0,
            "cache": False,
        },
        "train": {"max_steps": 3, "batch_size": 1, "batch_tokens": TOKENS, "activation_memory_gb": 1.0},
    }
    return load_config(None, base=base)


def _write_model(to: Path, model: Path | None) -> None:
    """A tiny Llama with random weights and the tokenizer of a model, or a small one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    to.mkdir()
    found = [file for pattern in _TOKENIZER_FILES for file in (model.glob(pattern) if model else ())]
    if model is not None and any(file.name.startswith("tokenizer.") for file in found):
        for file in found:
            shutil.copyfile(file, to / file.name)
        vocabulary = int(read_json(model / CONFIG).get("vocab_size", 0)) or len(load_tokenizer(model))
    else:
        vocabulary = _write_tokenizer(to)
    with torch.random.fork_rng(devices=[]):
        config = LlamaConfig(**_SIZES, vocab_size=vocabulary)
        tiny = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        tiny.save_pretrained(to)


def _write_tokenizer(to: Path) -> int:
    """A tokenizer of a few words; how many it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<unk>", "</s>", *dict.fromkeys(_WORDS)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(to / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (to / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(names)


def _run(folder: Path) -> dict[str, int]:
    told = folder / "told.json"
    command = [sys.executable, "-c", _SCRIPT, str(told), "train", str(folder / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_S)
    if done.returncode or not told.exists():
        raise PlanError(
            "HB701",
            f"a tiny training to measure this machine with failed: {done.stderr.strip()[-300:]}",
            fix="run halfbyte doctor, which says what is missing",
        )
    found: dict[str, int] = json.loads(told.read_text(encoding="utf-8"))
    return found
