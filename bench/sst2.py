"""Does a small encoder tuned in 4 bits learn to classify? Held-out accuracy on SST-2, beside 16 bits and a probe.

It owns the settings compared; it must not know how anything is trained or measured.

    python bench/sst2.py [--quick]

Model: all-MiniLM-L6-v2 (22 M). Rows: 16,000 phrases of SST-2's train.tsv, none of whose texts is in dev.tsv; held
out is all of dev.tsv (6,732 distinct rows). The probe is a logistic regression on mean-pooled features of the frozen
model in float32, with the best of four penalties on the held-out rows: the most that a probe can claim. The quick run
has 2,000 rows and the first 1,500 held out.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from figures import Figure, run, shared
from halfbyte.data.encoder_texts import EncodedExample, collate_encoded
from halfbyte.evaluate.statistics import Interval, Score, paired_difference
from halfbyte.model.encoders import hidden_states
from halfbyte.model.loading import load
from halfbyte.model.purpose import Head
from halfbyte.pipeline import run as run_recipe
from halfbyte.settings import Config
from halfbyte.tasks.classify import ClassifyTask

MODEL = "models/all-MiniLM-L6-v2-fp16"
ACCURACY, ACCURACY_QUICK = 0.86, 0.80
"""Least held-out accuracy of QLoRA."""
GAIN, GAIN_QUICK = 0.04, 0.0
"""Least that QLoRA must be above the probe: the lower end of the paired interval."""
BESIDE_LORA, BESIDE_LORA_QUICK = 0.01, 0.03
"""Most that LoRA in 16 bits may be above QLoRA in accuracy."""
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = rows(Path(folder), quick)
        scores = {}
        for method in ("qlora", "lora"):
            config = settings(method, train, held_out, Path(folder) / method)
            result = run_recipe(config)
            after = {change.name: change.after for change in result.summary.changes}
            for name, found in after.items():
                yield from figures_of(f"{method}: {name}", found)
            yield Figure(f"{method}: training time", result.summary.training.seconds, "s")
            yield Figure(f"{method}: weights and adapter", result.summary.setting.weight_bytes, "bytes")
            scores[method] = answers(result.folder / "eval" / "after.labels.jsonl")
            if method == "qlora":
                floor = ACCURACY_QUICK if quick else ACCURACY
                yield Figure.at_least("qlora: held-out accuracy", after["accuracy"].value, "share", floor)
        scores["probe"] = probe(ClassifyTask.prepare(settings("lora", train, held_out, Path(folder))))
    share = sum(s.total for s in scores["probe"]) / len(scores["probe"])
    yield Figure("probe on frozen features: held-out accuracy", share, "share")
    gain = paired_difference(scores["probe"], scores["qlora"])
    yield Figure("qlora above the probe", gain.value, "share")
    yield Figure.at_least(
        "qlora above the probe, lower end", gain.low, "share", GAIN_QUICK if quick else GAIN
    )
    above = paired_difference(scores["qlora"], scores["lora"])
    yield from figures_of("lora above qlora", above)
    limit = BESIDE_LORA_QUICK if quick else BESIDE_LORA
    yield Figure.at_most("lora above qlora, either way", abs(above.value), "share", limit)


def rows(folder: Path, quick: bool) -> tuple[Path, Path]:
    """The rows to train on and those held out, none of whose texts is among the former."""
    heading, *held_out = lines(shared("datasets/sst2/dev.tsv"))
    known = {text_of(line) for line in held_out}
    fresh = [line for line in lines(shared("datasets/sst2/train.tsv"))[1:] if text_of(line) not in known]
    chosen = random.Random(0).sample(fresh, 2_000 if quick else 16_000)
    files = folder / "train.tsv", folder / "dev.tsv"
    for file, kept in zip(files, (chosen, held_out[:1500] if quick else held_out), strict=True):
        file.write_text("\n".join([heading, *kept]) + "\n", encoding="utf-8")
    return files


def lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def text_of(line: str) -> str:
    return line.split("\t", maxsplit=1)[0].strip()


def settings(method: str, train: Path, held_out: Path, output: Path) -> Config:
    return Config.model_validate(
        {
            "model": str(shared(MODEL)),
            "task": "classify",
            "method": method,
            "output_dir": str(output),
            "data": {"train": [str(train)], "eval": [str(held_out)], "max_length": 128},
            "train": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3},
            "evaluate": {"batch_size": 64},
        }
    )


def answers(file: Path) -> list[Score]:
    items = [json_line(line) for line in lines(file)]
    return [Score(str(item["id"]), float(bool(item["correct"]))) for item in items]


def json_line(line: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(line)
    return found


def probe(task: ClassifyTask) -> list[Score]:
    """Which held-out rows a logistic regression on the frozen model's mean-pooled states gets right."""
    model = load(task.config.model, quantization=None, dtype=torch.float32, head=Head("embed"))
    numbers = task.numbers
    sides = []
    for side in (task.rows.train, task.rows.held_out):
        examples = list({e.id: e for e in side}.values())
        targets = torch.tensor([numbers[e.id] for e in examples])
        sides.append((examples, features(model, examples, task.pad_id), targets))
    (_, x, y), (held_out, x_held_out, y_held_out) = sides
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)  # a feature of this model is the same everywhere
    found = []
    for penalty in PENALTIES:
        weights = regression((x - mean) / spread, y, penalty)
        taken = ((x_held_out - mean) / spread @ weights[:-1] + weights[-1]).argmax(1)
        found.append((taken == y_held_out).tolist())
    best = max(found, key=sum)
    return [Score(e.id, float(right)) for e, right in zip(held_out, best, strict=True)]


@torch.no_grad()
def features(model: torch.nn.Module, examples: Sequence[EncodedExample], pad_id: int) -> torch.Tensor:
    """Mean of each row's last hidden states, (n, H)."""
    pooled = torch.empty(len(examples), model.config.hidden_size)
    order = np.argsort([-e.tokens for e in examples], kind="stable")
    for begin in range(0, len(order), 128):
        chosen = order[begin : begin + 128]
        batch = collate_encoded([examples[at] for at in chosen], pad_id)
        mask = torch.from_numpy(batch.attention_mask)[..., None].float()
        pooled[chosen] = (hidden_states(model, batch) * mask).sum(1) / mask.sum(1)
    return pooled


def regression(x: torch.Tensor, y: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (H + 1, C) of the least penalised cross-entropy; the last row is the bias."""
    weights = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weights[:-1] + weights[-1], y)
        value = value + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def figures_of(name: str, found: Interval) -> Iterator[Figure]:
    yield Figure(name, found.value, "")
    yield Figure(f"{name}, lower end", found.low, "")
    yield Figure(f"{name}, upper end", found.high, "")


if __name__ == "__main__":
    sys.exit(run("sst2", measure))
