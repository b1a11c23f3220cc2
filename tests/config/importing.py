"""Beginnings of other tools' files, and what the command and the library make of such files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from halfbyte.cli.app import app
from halfbyte.errors import ConfigError
from halfbyte.foreign.importing import import_file

Copy = Callable[[str], Path]

MEASURED = "val_set_size: 0.1\neval_steps: 50\n"
AXOLOTL = "base_model: m\nmicro_batch_size: 1\n"
FACTORY = "model_name_or_path: m\nstage: sft\nlora_target: all\n"
PEFT = "peft_type: LORA\ntarget_modules: [a]\n"
TRL = "model_name_or_path: m\nuse_peft: true\nlora_target_modules: all-linear\n"


def call(*arguments: object) -> Result:
    torch.set_num_threads(1)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(file: Path, text: str, tool: str | None = None, *drop: str) -> ConfigError:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        import_file(file, tool, drop)
    return caught.value
