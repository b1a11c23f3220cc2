"""Does a small vision transformer in 4 bits learn what it was never shown? Digits, upright and then turned.

It owns the digits, the model's shape and the floors; it must not know how anything is trained.

    python bench/mnist.py [--quick]

The 10,000 test images of MNIST, shared out by content hash: 8,000 to train on, 2,000 held out. A ViT of 0.2 million
parameters learns the upright digits from nothing (`method: full`). Then it is held in NF4 and tuned with QLoRA on the
same digits, each turned by an angle drawn from 60 to 120 degrees; no digit is held out on one side and trained on in
the other. Accuracies are those of held-out digits, with exact binomial intervals.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.data.check import split_rows
from halfbyte.data.images.read import read_images
from halfbyte.data.images.row import ImageRow
from halfbyte.evaluate.measure import Measurement
from halfbyte.evaluate.statistics import Interval
from halfbyte.pipeline import evaluate
from halfbyte.pipeline import run as run_recipe
from halfbyte.settings import Config

EPOCHS, QUICK_EPOCHS = (20, 12), (2, 1)
"""Passes over the upright digits, and over the turned ones."""
UPRIGHT, TURNED = 0.92, 0.80
"""Least accuracy of the base on upright digits, and of the tuned model on turned ones."""
ANGLES = (60.0, 120.0)
SHAPE = {
    "image_size": 28,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 28, "width": 28},
    "image_mean": [0.1307],
    "image_std": [0.3081],
}


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    first, second = QUICK_EPOCHS if quick else EPOCHS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder)
        write_start(folder / "start")
        upright = run_recipe(recipe(folder, "start", "upright", "full", epochs=first, lr=2e-3))
        yield from accuracies(
            {"base, upright digits": of(upright.summary.changes, "after")}, None if quick else UPRIGHT
        )
        base = upright.result.relative_to(folder)
        tuned = run_recipe(recipe(folder, str(base), "turned", "qlora", epochs=second, lr=4e-3))
        changes = tuned.summary.changes
        yield from accuracies({"base in NF4, turned digits": of(changes, "before")})
        yield from accuracies({"tuned, turned digits": of(changes, "after")}, None if quick else TURNED)
        back = evaluate(recipe(folder, str(base), "upright", "qlora"), tuned.result)
        yield from accuracies({"tuned, upright digits": accuracy(back)})
        yield Figure("trained beside the base", tuned.summary.setting.trainable_parameters, "parameters")
        yield Figure("tuning", tuned.summary.training.seconds, "s")


def accuracies(found: dict[str, Interval], floor: float | None = None) -> Iterator[Figure]:
    """A figure for each accuracy and for both ends of its interval."""
    for name, interval in found.items():
        claim = f"{name}: accuracy of {interval.n:,}"
        yield (
            Figure.at_least(claim, interval.value, "share", floor)
            if floor
            else Figure(claim, interval.value, "share")
        )
        yield Figure(f"{claim}, low", interval.low, "share")
        yield Figure(f"{claim}, high", interval.high, "share")


def of(changes: Sequence[Any], when: str) -> Interval:
    """Accuracy before or after a run."""
    (interval,) = [getattr(change, when) for change in changes if change.name == "accuracy"]
    assert isinstance(interval, Interval)
    return interval


def accuracy(measured: Measurement) -> Interval:
    """Accuracy among what was measured."""
    (interval,) = [metric.interval for metric in measured.metrics if metric.name == "accuracy"]
    return interval


def recipe(
    folder: Path, model: str, digits: str, method: str, *, epochs: int = 1, lr: float = 1e-3
) -> Config:
    """Settings of a run on upright or turned digits."""
    base = {
        "model": str(folder / model),
        "task": "classify_images",
        "method": method,
        "output_dir": str(folder / f"{method}-{digits}"),
        "lora": {"r": 16, "alpha": 32},
        "data": {
            "train": [str(folder / f"{digits}-train-images-idx3-ubyte")],
            "eval": [str(folder / f"{digits}-held_out-images-idx3-ubyte")],
        },
        "train": {"epochs": epochs, "batch_size": 64, "learning_rate": lr, "warmup_ratio": 0.1},
        "evaluate": {"batch_size": 250},
    }
    return load_config(None, base=base)


def write_digits(folder: Path) -> None:
    """Upright and turned digits, to train on and held out, as IDX files."""
    rows = read_images(shared("datasets/mnist/t10k-images-idx3-ubyte.gz"))
    random = np.random.default_rng(0)
    for side, members in zip(("train", "held_out"), split_rows(rows, 0.2, seed=0), strict=True):
        upright = [row.pixels()[:, :, 0] for row in members]
        turned = [
            np.asarray(PIL.Image.fromarray(image).rotate(angle, PIL.Image.Resampling.BILINEAR))
            for image, angle in zip(upright, random.uniform(*ANGLES, len(upright)), strict=True)
        ]
        for name, images in {"upright": upright, "turned": turned}.items():
            write_idx(folder, f"{name}-{side}", images, members)


def write_idx(folder: Path, name: str, images: list[NDArray[np.uint8]], rows: list[ImageRow]) -> None:
    """A file of images and one of their labels."""
    labels = bytes(int(row.label) for row in rows)
    header = struct.pack(">4B3I", 0, 0, 8, 3, len(images), 28, 28)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(header + np.stack(images).tobytes())
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels)


def write_start(folder: Path) -> None:
    """The model before it has seen anything."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


if __name__ == "__main__":
    sys.exit(run("mnist", measure))
