"""TRL's side of bench/preferences.py: DPOTrainer over given tokens in a given order, from a given adapter.

It owns the settings of this side; it must not know what it is compared with. Reads one JSON object, prints the losses
of all steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


class Given(DPOTrainer):
    """DPOTrainer that takes rows that are tokens already, one after the other."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    options = json.load(sys.stdin)
    torch.set_num_threads(options["threads"])
    rows = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    base = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            beta=options["beta"],
            per_device_train_batch_size=options["batch_size"],
            max_length=None,
            learning_rate=options["learning_rate"],
            lr_scheduler_type="constant",
            max_steps=options["steps"],
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Given(
            model=PeftModel.from_pretrained(base, options["adapter"], is_trainable=True),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options["model"]),
        )
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps([[entry["loss"], entry["rewards/margins"]] for entry in log]))


if __name__ == "__main__":
    main()
