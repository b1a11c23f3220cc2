"""Does tuning in 4 bits learn as well as tuning in 16? Held-out loss of every method, on the same real rows.

It owns the settings compared and the table; it must not know how anything is trained or measured.

    python bench/methods.py [--quick]

Model: base-11m. Rows: alpaca_en_demo.json, a tenth held out, three splits, one per seed; every method sees the
same rows in the same order. A loss is pooled over the seeds: each held-out row counts with its tokens once per
seed that held it out, and intervals and differences are over rows. The quick run has one seed, the rows the
promises are about, and a few steps.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.data.tokenise import Example
from halfbyte.evaluate.perplexity import ItemLoss, held_out_loss
from halfbyte.evaluate.statistics import Interval, Score, bootstrap_ratio, paired_difference
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare
from halfbyte.tasks.task import Task
from halfbyte.train.loop import TrainRun, train
from halfbyte.train.methods import ModelSize, autocast_dtype, load_base, make_trainable

WITHIN = 0.01
"""Most that QLoRA-NF4's loss may lie above LoRA's, as a share of LoRA's: the upper end of the 95 % interval."""

LEARNS, LEARNS_QUICK = 0.15, 0.02
"""Least that tuning must take off the untuned model's loss, in nats per token: the lower end of the interval.

A model of 11 million parameters that has seen the language once gains 0.2 from 900 rows of instructions.
"""

QUICK_STEPS = 25
RESAMPLES = 10_000
COLUMNS = (
    *("method", "held-out loss", "95 %", "perplexity", "above LoRA", "95 %"),
    *("trainable", "weights MB", "train s"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: As printed.
        method: full, lora or qlora.
        tuned: Whether it is trained, or measured as it is.
        lr: Learning rate.
        quantization: Of the base, for qlora.
    """

    name: str
    method: str
    tuned: bool = True
    lr: float = 2e-3
    quantization: Mapping[str, Any] | None = None


LORA = Row("LoRA, r 16", "lora")
QLORA = Row("QLoRA NF4", "qlora")
BASE = Row("base, untuned", "lora", tuned=False)
ROWS = (
    BASE,
    Row("base in NF4, untuned", "qlora", tuned=False),
    Row("full", "full", lr=3e-4),
    LORA,
    QLORA,
    Row("QLoRA FP4", "qlora", quantization={"format": "fp4"}),
    Row("QLoRA NF4, mse scales", "qlora", quantization={"scales": "mse"}),
)


@dataclass(frozen=True)
class Trial:
    """One row of the table with one seed.

    Args:
        items: Loss of each held-out row.
        trainable: Numbers that training changed.
        weight_bytes: Bytes of model and adapter.
        seconds: Of training; 0 where nothing was trained.
    """

    items: tuple[ItemLoss, ...]
    trainable: int
    weight_bytes: int
    seconds: float


def measure(quick: bool) -> Iterator[Figure]:
    seeds, rows = ((0,), (BASE, LORA, QLORA)) if quick else ((0, 1, 2), ROWS)
    trials: dict[str, list[Trial]] = {row.name: [] for row in rows}
    for seed in seeds:
        data = prepare(settings(LORA, seed, quick))
        for row in rows:
            trials[row.name].append(trial(row, settings(row, seed, quick), data))
            print(f"seed {seed}, {row.name}: {trials[row.name][-1].seconds:.0f} s", file=sys.stderr)
    pooled = {name: pool(found) for name, found in trials.items()}
    losses = {name: ratio(scores) for name, scores in pooled.items()}
    excess = {name: paired_difference(pooled[LORA.name], scores) for name, scores in pooled.items()}
    print_table(trials, losses, excess)
    for row in rows:
        yield from figures_of(row.name, trials[row.name], losses[row.name])
    for row in rows:
        more, claim = excess[row.name], f"{row.name}: held-out loss above LoRA's"
        yield Figure(claim, more.value / losses[LORA.name].value, "share")
        high = (f"{claim}, upper end", more.high / losses[LORA.name].value, "share")
        yield Figure.at_most(*high, WITHIN) if row is QLORA else Figure(*high)
    for row in (LORA, QLORA):
        gain = paired_difference(pooled[row.name], pooled[BASE.name]).low
        claim = f"{row.name}: taken off the untuned loss, lower end"
        yield Figure.at_least(claim, gain, "nats per token", LEARNS_QUICK if quick else LEARNS)


def settings(row: Row, seed: int, quick: bool) -> Config:
    """The settings of one trial; all rows differ only in method, quantization and learning rate."""
    base = {
        "model": str(shared("models/base-11m")),
        "method": row.method,
        "seed": seed,
        "quantization": dict(row.quantization or {}),
        "lora": {"r": 16, "alpha": 32},
        "data": {
            "train": str(shared("datasets/alpaca/alpaca_en_demo.json")),
            "max_length": 256,
            "max_truncated": 1.0,
        },
        "train": {
            "epochs": 2,
            "max_steps": QUICK_STEPS if quick else None,
            "packing": False,
            "batch_size": 4,
            "learning_rate": row.lr,
        },
    }
    return load_config(None, base=base)


def trial(row: Row, config: Config, data: Task[Example]) -> Trial:
    """Trains if the row asks for it, and measures."""
    model = load_base(config)
    pad_id, seconds = data.pad_id, 0.0
    if row.tuned:
        make_trainable(model, config)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            train(
                model,
                data.rows.train,
                config.train,
                TrainRun(
                    folder=Path(folder),
                    save=lambda _: None,
                    seed=config.seed,
                    pad_id=pad_id,
                    autocast=autocast_dtype(config),
                ),
            )
            seconds = time.perf_counter() - begin
    size = ModelSize.of(model)
    found = held_out_loss(model, data.rows.held_out, batch_size=16, pad_id=pad_id)
    return Trial(found.items, size.trainable if row.tuned else 0, size.nbytes, seconds)


def pool(trials: Sequence[Trial]) -> list[Score]:
    """One score per held-out row: its losses of all seeds over its tokens of all seeds."""
    sums: dict[str, tuple[float, int]] = {}
    for item in (item for each in trials for item in each.items):
        nll, tokens = sums.get(item.id, (0.0, 0))
        sums[item.id] = (nll + item.nll, tokens + item.tokens)
    return [Score(name, nll, tokens) for name, (nll, tokens) in sums.items()]


def ratio(scores: Sequence[Score]) -> Interval:
    return bootstrap_ratio([s.total for s in scores], [s.count for s in scores], resamples=RESAMPLES)


def figures_of(name: str, trials: Sequence[Trial], loss: Interval) -> Iterator[Figure]:
    yield Figure(f"{name}: held-out loss", loss.value, "nats per token")
    yield Figure(f"{name}: held-out loss, lower end", loss.low, "nats per token")
    yield Figure(f"{name}: held-out loss, upper end", loss.high, "nats per token")
    yield Figure(f"{name}: perplexity", math.exp(loss.value), "")
    yield Figure(f"{name}: trainable parameters", trials[0].trainable, "")
    yield Figure(f"{name}: weights and adapter", trials[0].weight_bytes, "bytes")
    yield Figure(f"{name}: training time, mean of seeds", mean([t.seconds for t in trials]), "s")


def print_table(
    trials: Mapping[str, Sequence[Trial]], losses: Mapping[str, Interval], excess: Mapping[str, Interval]
) -> None:
    """The table for people, as Markdown, on stderr: stdout is the figures'."""
    lora = losses[LORA.name].value
    print(
        f"\n{next(iter(losses.values())).n} held-out rows, {len(trials[LORA.name])} seeds\n", file=sys.stderr
    )
    print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}", file=sys.stderr)
    for name, loss in losses.items():
        more, found = excess[name], trials[name]
        cells = [
            name,
            f"{loss.value:.3f}",
            f"{loss.low:.3f} to {loss.high:.3f}",
            f"{math.exp(loss.value):.2f}",
            f"{more.value / lora:+.2%}",
            f"{more.low / lora:+.2%} to {more.high / lora:+.2%}",
            f"{found[0].trainable:,}",
            f"{found[0].weight_bytes / 1e6:.1f}",
            f"{mean([t.seconds for t in found]):.0f}",
        ]
        print(f"| {' | '.join(cells)} |", file=sys.stderr)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(run("methods", measure))
