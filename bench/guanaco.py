"""An epoch of QLoRA on real conversations: what it does to the loss of rows that were held out.

It owns the run and what it must come to; it must not know how a step is done.

    python bench/guanaco.py [--quick]

Model: base-11m in NF4, LoRA on every linear layer, one epoch. Rows: guanaco-llama2-1k, texts in Llama 2's chat
format of which, as of any text, every token is learnt (`<s>` and `[INST]` are plain characters to this tokenizer); a
tenth is held out. The base saw these texts once among all that it was trained on, held-out rows too, so that what is
measured is how much one more look at the other rows helps, not how a model takes to text it never saw.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.pipeline import run as run_recipe

MODEL, ROWS = "models/base-11m", "datasets/oasst/guanaco-llama2-1k.parquet"
QUICK_STEPS = 3
BETTER = -0.01
"""Most that the paired difference's upper end may be, in nats per token: below zero by more than rounding."""


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    with tempfile.TemporaryDirectory() as folder:
        base: dict[str, Any] = {
            "model": str(shared(MODEL)),
            "output_dir": str(Path(folder) / "run"),
            "data": {"train": [str(shared(ROWS))], "max_length": 512, "max_truncated": 1.0, "cache": False},
            "train": {
                "epochs": 1,
                "learning_rate": 2e-3,
                "batch_tokens": 2048,
                "gradient_accumulation_steps": 2,
                **({"max_steps": QUICK_STEPS} if quick else {}),
            },
            "evaluate": {"exact_match": False},
        }
        summary = run_recipe(load_config(None, [], base)).summary
    setting, training = summary.setting, summary.training
    rows = f"{setting.train_rows} rows, {training.tokens:,} tokens, {training.steps} steps"
    loss = next(change for change in summary.changes if change.name == "loss")
    for when, interval in (("before", loss.before), ("after", loss.after)):
        ends = f"{interval.low:.3f} to {interval.high:.3f} over {interval.n} held-out rows"
        yield Figure(f"guanaco, {rows}: loss {when}, {ends}", interval.value, "nats")
    difference = loss.difference
    assert difference is not None, "a loss is measured row by row"
    ends = f"{difference.low:.3f} to {difference.high:.3f}"
    yield Figure(f"guanaco: paired difference of the loss, {ends}", difference.value, "nats")
    claim = "guanaco: upper end of the paired difference's 95 % interval"
    if quick:
        yield Figure(claim, difference.high, "nats")
    else:
        yield Figure.at_most(claim, difference.high, "nats", BETTER)
    yield Figure("guanaco: training", training.seconds, "s")
    if (noise := summary.noise_scale) is not None:
        yield Figure(
            f"guanaco: noise scale in steps, {noise.low:.2g} to {noise.high:.2g}", noise.value, "steps"
        )


if __name__ == "__main__":
    sys.exit(run("guanaco", measure))
