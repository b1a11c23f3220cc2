"""Learning from judged answers: whether it happens, on real rows, and whether DPO is TRL's DPO.

It owns the runs and what they must come to; it must not know any objective.

    python bench/preferences.py [--quick] [--task NAME]

Model: base-11m in NF4, LoRA on every linear layer. Rows: those of dpo_en_demo.json and kto_en_demo.json of at
most 640 tokens, a fifth held out. The reward accuracy of training is that of the last epoch's steps, each before its
update. TRL's side is a process in an environment of its own: the same tokens in the same order, from the same
adapter, everything in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.data.read import read_rows
from halfbyte.data.render import Renderer
from halfbyte.data.row import Row
from halfbyte.data.tokenise import Example, tokenise_rows
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.model.adapters import save_adapter
from halfbyte.pipeline import run as run_recipe
from halfbyte.settings import PREFERENCES, Config
from halfbyte.tasks.known import prepare
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.methods import make_trainable
from peers import peers_python

MODEL, LONGEST = "models/base-11m", 640
FILES = {"kto": "datasets/preference/kto_en_demo.json"}
PAIRS = "datasets/preference/dpo_en_demo.json"
RATES = {"dpo": 5e-4, "simpo": 5e-4, "orpo": 2e-3, "kto": 1e-3}
EPOCHS, QUICK_STEPS = 10, 3
LEARNT = 0.9
"""Least reward accuracy on the training rows."""

SAME_STEPS, SAME_BATCH, SAME = 20, 8, 0.01
"""Steps beside TRL, pairs in each, and most that any step's losses may differ, as a share of TRL's."""


def measure(tasks: Sequence[str], quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    with tempfile.TemporaryDirectory() as folder:
        if "dpo" in tasks:
            yield from beside_trl(Path(folder), quick)
        for task in tasks:
            yield from learnt(task, Path(folder), quick)


def learnt(task: str, folder: Path, quick: bool) -> Iterator[Figure]:
    """A run of one task."""
    settings = {
        "train.epochs": EPOCHS,
        "train.learning_rate": RATES[task],
        **({"train.max_steps": QUICK_STEPS} if quick else {}),
    }
    result = run_recipe(config_of(task, folder / task, fitting(task, folder), **settings))
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    last = [step for step in steps if step["epoch"] > steps[-1]["epoch"] - 1]
    accuracy = sum(s["reward_accuracy"] * s["documents"] for s in last) / sum(s["documents"] for s in last)
    claim = f"{task}, {result.summary.setting.train_rows} rows: reward accuracy in the last epoch"
    yield Figure(claim, accuracy, "share") if quick else Figure.at_least(claim, accuracy, "share", LEARNT)
    for change in result.summary.changes:
        for when, interval in (("before", change.before), ("after", change.after)):
            ends = f"{interval.low:.3f} to {interval.high:.3f} over {interval.n} held-out rows"
            yield Figure(f"{task}: {change.name} {when}, {ends}", interval.value, "")


def beside_trl(folder: Path, quick: bool) -> Iterator[Figure]:
    """DPO from one adapter over the same rows, ours and TRL's."""
    steps = QUICK_STEPS if quick else SAME_STEPS
    config = config_of(
        "dpo",
        folder / "same",
        whole_batches(fitting("dpo", folder)),
        method="lora",
        dtype="float32",
        **{
            "data.eval_fraction": 0.0,
            "train.packing": False,
            "train.batch_size": SAME_BATCH,
            "train.max_steps": steps,
            "train.schedule": "constant",
            "train.warmup_ratio": 0.0,
            "train.learning_rate": RATES["dpo"],
        },
    )
    ours, options = dpo_of_ours(config, folder)
    command = [peers_python(), Path(__file__).parent / "sides" / "trl_dpo_side.py"]
    done = subprocess.run(
        command, input=json.dumps(options), stdout=subprocess.PIPE, text=True, check=True, cwd=folder
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    apart = [abs(a - b) / b for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    yield Figure(f"dpo, {steps} steps: loss of the last one, TRL", theirs[-1][0], "nats")
    yield Figure(f"dpo, {steps} steps: loss of the last one, ours", ours[-1][0], "nats")
    yield Figure.at_most(f"dpo, {steps} steps: largest difference to TRL's loss", max(apart), "share", SAME)
    margins = max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    yield Figure(f"dpo, {steps} steps: largest difference to TRL's margin", margins, "nats")


def dpo_of_ours(config: Config, folder: Path) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Loss and margin of each step, and what TRL needs for the same."""
    task = prepare(config)
    model = task.load()
    make_trainable(model, config)
    save_adapter(model, folder / "adapter", config.model)
    task.begin(model)
    plan, rows = task.plan(), folder / "rows.json"
    epochs = (window for epoch in itertools.count() for window in plan.order.windows(epoch))
    passes = list(itertools.islice(itertools.chain.from_iterable(epochs), plan.total_steps))
    assert all(len(members) == SAME_BATCH for members in passes), "a short pass would shift TRL's"
    given = [as_tokens(*(task.rows.train[2 * unit + k] for k in (0, 1))) for one in passes for unit in one]
    rows.write_text(json.dumps(given), encoding="utf-8")
    train(
        model,
        task.rows.train,
        config.train,
        TrainRun(folder / "ours", lambda _: None, config.seed, task.pad_id, loss=task.loss),
    )
    lines = (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(s["loss"], s["reward_better"] - s["reward_worse"]) for s in map(json.loads, lines)]
    return found, {
        "threads": torch.get_num_threads(),
        "rows": str(rows),
        "model": config.model,
        "adapter": str(folder / "adapter"),
        "beta": 0.1,
        "batch_size": SAME_BATCH,
        "learning_rate": config.train.learning_rate,
        "steps": plan.total_steps,
    }


def whole_batches(rows: Path) -> Path:
    """As many of some rows as fill batches, as a file beside theirs."""
    given = json.loads(rows.read_text(encoding="utf-8"))
    target = rows.with_name("whole_batches.json")
    target.write_text(json.dumps(given[: len(given) // SAME_BATCH * SAME_BATCH]), encoding="utf-8")
    return target


def as_tokens(better: Example, worse: Example) -> dict[str, list[int]]:
    """A pair in TRL's columns."""
    (begin, *_), (other, *_) = (e.trained.nonzero()[0].tolist() for e in (better, worse))
    assert better.input_ids[:begin].tolist() == worse.input_ids[:other].tolist(), "one prompt"
    return {
        "prompt_ids": better.input_ids[:begin].tolist(),
        "chosen_ids": better.input_ids[begin:].tolist(),
        "rejected_ids": worse.input_ids[other:].tolist(),
    }


def fitting(task: str, folder: Path, longest: int = LONGEST) -> Path:
    """The rows that are short enough, as a file."""
    source = shared(FILES.get(task, PAIRS))
    target = folder / source.name
    if not target.exists():
        renderer = Renderer(load_tokenizer(str(shared(MODEL))))
        rows = read_rows([str(source)])
        kept = []
        for row, given in zip(rows, json.loads(source.read_text(encoding="utf-8")), strict=True):
            sides = [turns for turns in (row.messages, row.rejected) if turns is not None]
            plain = [Row(turns, None, row.source, row.line) for turns in sides]
            if all(e.tokens <= longest for e in tokenise_rows(plain, renderer, 10**6).examples):
                kept.append(given)
        target.write_text(json.dumps(kept), encoding="utf-8")
    return target


def config_of(task: str, folder: Path, rows: Path, **settings: Any) -> Config:
    """The settings of a run."""
    base = {
        "task": task,
        "model": str(shared(MODEL)),
        "output_dir": str(folder),
        "data": {"train": [str(rows)], "max_length": LONGEST, "eval_fraction": 0.2},
    }
    return load_config(None, [f"{name}={json.dumps(value)}" for name, value in settings.items()], base)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Learning from judged answers.", epilog="--quick and --results: as all benchmarks."
    )
    parser.add_argument("--task", action="append", choices=PREFERENCES, help="only this one")
    options, rest = parser.parse_known_args()
    return run("preferences", partial(measure, options.task or PREFERENCES), rest)


if __name__ == "__main__":
    sys.exit(main())
