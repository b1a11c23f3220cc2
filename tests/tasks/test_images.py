"""A run on images, end to end: evidence, resume to the bit, what was saved measured again, refusals in time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

import halfbyte as hb
from halfbyte.config import load_config
from halfbyte.data.images.decode import decode
from halfbyte.errors import ConfigError, DataError, ModelError
from halfbyte.pipeline import evaluate, rehearse, run
from halfbyte.report.watch import Watch
from halfbyte.settings import Config
from halfbyte.tasks.known import prepare
from halfbyte.train.display import Display, Silent
from halfbyte.train.metrics import StepRecord

Make = Callable[..., Config]
SIDE = 12
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": SIDE}
NAMES = ("across", "down", "plain")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def picture(label: str, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Bars across, bars down, or none, in noise."""
    image = random.integers(0, 90, (SIDE, SIDE, 3))
    if label == "across":
        image[::3] += 120
    elif label == "down":
        image[:, ::3] += 120
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in folders and a model that knows nothing of them."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for label in NAMES:
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(20):
            image = PIL.Image.fromarray(picture(label, random))
            image.save(folder / "pictures" / label / f"{number}.png")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**shape, image_size=SIDE, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def make(world: Path, tmp_path: Path) -> Make:
    def settings(*wishes: str, **data: Any) -> Config:
        base = {
            "model": str(world / "model"),
            "task": "classify_images",
            "output_dir": str(tmp_path / "run"),
            "forecast": False,
            "dtype": "float32",
            "data": {"train": [str(world / "pictures")], "eval_fraction": 0.25, **data},
            "train": {"epochs": 8, "batch_size": 9, "learning_rate": 1e-2, "save_steps": 3},
            "evaluate": {"bootstrap": 200},
        }
        return load_config(None, wishes, base)

    return settings


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_learns_and_leaves_its_evidence(make: Make) -> None:
    result = run(make())
    changes = {change.name: change for change in result.summary.changes}
    assert {"accuracy", "macro_f1", "label_loss"} <= changes.keys()
    assert changes["accuracy"].after.value >= 0.8
    assert changes["accuracy"].verdict == "better"
    kept = load_file(result.result / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in kept
    assert sum("lora_A" in name for name in kept) == 2 * 6
    assert json.loads((result.result / "labels.json").read_text()) == {"labels": list(NAMES)}
    layers = [e for e in lines(result.folder / "events.jsonl") if e["event"] == "layers"]
    assert [(e["type"], e["fused"]) for e in layers] == [("ViTLayer", True)]
    after = {record["label"]: record for record in lines(result.folder / "eval" / "after.classes.jsonl")}
    assert sum(record["rows"] for record in after.values()) == 15
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert set(manifest["rows_sha256"]) == {"train", "held_out"}


def test_what_was_saved_measures_as_it_did_when_it_was_trained(make: Make, world: Path) -> None:
    result = run(make())
    held_out = [record["where"] for record in lines(result.folder / "eval" / "after.labels.jsonl")]
    table = world / "held_out.jsonl"
    rows = [{"image": str(where), "label": Path(where).parent.name} for where in held_out]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = evaluate(make(eval=[str(table)]), result.result)
    after = {change.name: change.after for change in result.summary.changes}
    assert {metric.name: metric.interval.value for metric in again.metrics} == pytest.approx(
        {name: interval.value for name, interval in after.items()}, abs=1e-9
    )
    model = hb.load(
        world / "model", task="classify_images", quantization="nf4", dtype="float32", adapter=result.result
    )
    assert model.config.id2label == dict(enumerate(NAMES))


def test_a_cut_run_goes_on_to_the_same_bits(make: Make, tmp_path: Path) -> None:
    class Crash(Silent):
        def step(self, record: StepRecord) -> None:
            if record.step == 5:
                raise ZeroDivisionError

    class Cut(Watch):
        def training(self, every: int) -> Display:
            return Crash()

    whole = run(make(f"output_dir={tmp_path / 'whole'}", "lora.dropout=0.1"))
    with pytest.raises(ZeroDivisionError):
        run(make("lora.dropout=0.1"), watch=Cut())
    resumed = run(make("lora.dropout=0.1"), resume=True)
    weights = "adapter_model.safetensors"
    assert (resumed.result / weights).read_bytes() == (whole.result / weights).read_bytes()
    assert resumed.summary.changes == whole.summary.changes


def test_a_model_trained_whole_is_one_that_transformers_loads(make: Make) -> None:
    result = run(make("method=full", "train.epochs=2"))
    model = AutoModelForImageClassification.from_pretrained(result.result)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert json.loads((result.result / "preprocessor_config.json").read_text()) == PROCESSOR
    task = prepare(make(f"model={result.result}"))
    ours = task.load()
    example = task.collate(list(task.rows.held_out))
    pixels = torch.from_numpy(example.pixel_values)
    with torch.no_grad():
        theirs = model(pixel_values=pixels).logits
        assert torch.allclose(ours(pixel_values=pixels).logits, theirs, atol=0.2), "4 bits are near"
        assert not torch.allclose(ours(pixel_values=pixels).logits, theirs, atol=1e-6)


def test_a_base_with_these_labels_in_another_order_keeps_its_head(
    make: Make, world: Path, tmp_path: Path
) -> None:
    order = ("plain", "down", "across")
    base = ViTForImageClassification.from_pretrained(
        world / "model", id2label=dict(enumerate(order)), num_labels=3, ignore_mismatched_sizes=True
    )
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    task = prepare(make(f"model={tmp_path / 'base'}"))
    assert task.labels == order
    assert torch.equal(task.load().classifier.weight, base.classifier.weight)


def test_a_rehearsal_writes_nothing_and_counts(make: Make, tmp_path: Path) -> None:
    found = rehearse(make())
    task, plan = found.task, found.plan
    assert plan.total_steps == 8 * 5
    facts = task.facts()
    assert (facts["train_rows"], facts["held_out_rows"], facts["train_tokens"]) == (45, 15, 45 * 10)
    assert facts["labels"] == "across, down, plain"
    assert not (tmp_path / "run").exists()


def test_images_that_are_prepared_otherwise_than_in_training_are_refused(
    make: Make, world: Path, tmp_path: Path
) -> None:
    result = run(make("train.max_steps=1"), evaluate=False)
    other = tmp_path / "model"
    other.mkdir()
    for file in (world / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"resample": 0}))
    with pytest.raises(ModelError, match="HB326(?s:.*)resized, cropped or scaled in another way"):
        evaluate(make(f"model={other}"), result.result)
    (other / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | {"size": 16}))
    with pytest.raises(ModelError, match="HB361.*become 16 x 16 pixels, the model is shown 12 x 12"):
        rehearse(make(f"model={other}"), overwrite=True)


def test_labels_and_sides_are_judged_before_the_model_is_read(
    make: Make, world: Path, tmp_path: Path
) -> None:
    def rows(name: str, *of: tuple[str, str]) -> list[str]:
        file = tmp_path / name
        named = [{"image": str(world / "pictures" / image), "label": label} for image, label in of]
        file.write_text("".join(json.dumps(row) + "\n" for row in named))
        return [str(file)]

    train = rows("train.jsonl", ("across/1.png", "across"), ("down/1.png", "down"))
    with pytest.raises(DataError, match="HB231"):
        rehearse(make(train=rows("one.jsonl", ("across/1.png", "across"), ("across/2.png", "across"))))
    with pytest.raises(DataError, match="HB232(?s:.*)strange.jsonl:1"):
        rehearse(make(train=train, eval=rows("strange.jsonl", ("across/2.png", "Across"))))
    with pytest.raises(DataError, match="HB205(?s:.*)same.jsonl:1 equals"):
        rehearse(make(train=train, eval=rows("same.jsonl", ("down/1.png", "down"))))
    with pytest.raises(DataError, match="HB238(?s:.*)other.jsonl:1"):
        rehearse(make(train=train, eval=rows("other.jsonl", ("down/1.png", "across"))))
    result = run(make("train.max_steps=1"), evaluate=False)
    with pytest.raises(DataError, match="HB232(?s:.*)'sideways'"):
        evaluate(make(eval=rows("new.jsonl", ("down/3.png", "sideways"))), result.result)
    with pytest.raises(ModelError, match="HB351"):
        evaluate(make())


def test_skipped_images_are_listed(make: Make, world: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    for label in NAMES[:2]:
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(4):
            PIL.Image.fromarray(picture(label, random)).save(tmp_path / "set" / label / f"{number}.png")
    (tmp_path / "set" / "down" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run(make("train.max_steps=1", train=[str(tmp_path / "set")], skip_bad_rows=1), evaluate=False)
    (skipped,) = lines(result.folder / "bad_rows.jsonl")
    assert skipped["file"].endswith("bad.png")


def test_idx_files_and_labels_are_in_the_manifest(make: Make, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    images = random.integers(0, 256, (20, SIDE, SIDE), np.uint8)
    (tmp_path / "a-images-idx3-ubyte").write_bytes(
        struct.pack(">4B3I", 0, 0, 8, 3, 20, SIDE, SIDE) + images.tobytes()
    )
    labels = bytes(n % 2 for n in range(20))
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 20) + labels)
    result = run(make("train.max_steps=1", train=[str(tmp_path)]), evaluate=False)
    files = json.loads((result.folder / "manifest.json").read_text())["data"]
    assert [Path(file["path"]).name for file in files] == ["a-images-idx3-ubyte", "a-labels-idx1-ubyte"]


@pytest.mark.parametrize(
    "wish",
    [
        "data.max_length=64",
        "data.template=plain",
        "data.weights=[2]",
        "train.batch_tokens=600",
        "evaluate.samples=1",
    ],
)
def test_settings_of_words_are_refused(make: Make, wish: str) -> None:
    name = wish.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"HB102(?s:.*){name}(?s:.*)task classify_images does not read it"):
        make(wish)


def test_reading_tells_how_far_it_is(make: Make) -> None:
    told: list[tuple[int, int]] = []
    prepare(make(), progress=lambda *done: told.append(done))
    assert told == [(60, 60)]


def test_only_the_images_of_a_pass_are_in_memory(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    task = prepare(make())
    read: list[str] = []
    monkeypatch.setattr(
        "halfbyte.data.images.row.decode", lambda file: read.append(file.name) or decode(file)
    )
    batch = task.collate([task.rows.train[at] for at in (3, 1)])
    assert read == [Path(task.rows.train[at].where).name for at in (3, 1)]
    assert batch.pixel_values.shape == (2, 3, SIDE, SIDE)
    assert (batch.tokens, batch.trained_tokens, len(batch.documents)) == (2 * 10, 2, 2)
