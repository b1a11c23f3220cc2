"""SFTTrainer as it is, stopped before and after each step, for bench/step_vs_peers.py and bench/in_trainer.py.

It owns the settings of this side: TRL's defaults, but for the length of a step, where nothing is saved and what is
logged; it must not know what it is compared with.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft_side import base, lora
from protocol import Link
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Counting(SFTTrainer):
    """SFTTrainer that remembers what its last step was given."""

    counts: dict[str, float]

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """As SFTTrainer's."""
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        self.counts = {"tokens": tokens, "trained": int((inputs["labels"][:, 1:] != -100).sum())}
        loss = super().training_step(model, inputs, *rest)
        self.counts["loss"] = float(loss)
        return loss


class Turns(TrainerCallback):
    """Lets the trainer go on when it is told to."""

    def __init__(self, link: Link, trainer: Counting, facts: dict[str, Any]) -> None:
        self._link, self._trainer, self._facts = link, trainer, facts

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded, and the first batch made."""
        if state.global_step == 0:
            self._link.ready(**self._facts)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step is done."""
        self._link.done(**self._trainer.counts)


def leak(trainer: Counting) -> float | None:
    """How far the logits of a packed row move when the row before it is another.

    None where only one row was packed, or where they do not even move without the positions that tell rows apart.
    """
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["labels"]
    begins = (batch["position_ids"][0] == 0).nonzero()[:3, 0].tolist()
    if len(begins) < 2:
        return None
    other = batch["input_ids"].clone()
    other[:, : begins[1]] = other[:, : begins[1]].flip(1)

    def moved(**inputs: Any) -> float:
        """The largest difference of the second row's logits."""
        second = slice(begins[1], begins[2] if len(begins) > 2 else None)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = [
                trainer.model(**{**inputs, "input_ids": ids}).logits[:, second].float()
                for ids in (batch["input_ids"], other)
            ]
        return float((logits[0] - logits[1]).abs().max())

    return moved(**batch) if moved() > 0 else None


def main() -> None:
    link = Link()
    options = link.options
    torch.set_num_threads(options["threads"])
    rows = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    dataset = Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "completion_mask": [[int(trained) for trained in row["trained"]] for row in rows],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=options["dtype"] == "bfloat16",
            per_device_train_batch_size=options["batch_size"],
            packing=options["packing"],
            gradient_checkpointing=options.get("checkpointing", True),
            completion_only_loss=True,
            learning_rate=options["learning_rate"],
            max_steps=10**6,
            seed=options["seed"],
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Counting(
            model=base(options),
            args=settings,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(options["model"]),
            peft_config=lora(options),
        )
        facts = {"leak": leak(trainer) if options["packing"] else None}
        trainer.add_callback(Turns(link, trainer, facts))
        trainer.train()


if __name__ == "__main__":
    main()
