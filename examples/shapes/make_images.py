"""Draw the images of the shapes example, upright and turned, and make the model that begins knowing nothing of them.

It owns the shapes and how they are drawn; it must not know how anything is trained.

    python -m examples.shapes.make_images [--out build/shapes]

From the repository's root; a few seconds. The same seed draws the same images.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import ViTConfig, ViTForImageClassification

SEED = 0
SIDE = 32  # pixels
FINER = 4  # drawn so many times larger, then brought to size, which smooths the edges
UPRIGHT_EACH, TURNED_EACH = 250, 125
UPRIGHT, TURNED = (-12.0, 12.0), (60.0, 120.0)  # degrees

Point = tuple[float, float]
# Strokes as corners on a field from -1 to 1, y downwards. Turned by a quarter, a zigzag looks like a peak.
SHAPES: dict[str, list[list[Point]]] = {
    "angle": [[(-0.7, -1), (-0.7, 1), (0.7, 1)]],
    "bridge": [[(-0.8, 1), (-0.8, -0.8), (0.8, -0.8), (0.8, 1)]],
    "cup": [[(0.8, -0.9), (-0.8, -0.9), (-0.8, 0.9), (0.8, 0.9)]],
    "hammer": [[(-0.9, -0.9), (0.9, -0.9)], [(0, -0.9), (0, 1)]],
    "peak": [[(-0.8, 1), (-0.8, -1), (0.8, 1), (0.8, -1)]],
    "roof": [[(-0.9, 0.8), (0, -0.9), (0.9, 0.8)]],
    "stairs": [[(-0.9, 0.9), (-0.3, 0.9), (-0.3, 0), (0.3, 0), (0.3, -0.9), (0.9, -0.9)]],
    "zigzag": [[(-0.8, -0.9), (0.8, -0.9), (-0.8, 0.9), (0.8, 0.9)]],
}


def draw(strokes: list[list[Point]], angles: tuple[float, float], rng: random.Random) -> Image.Image:
    """One image: a shape somewhere near the middle, of some size, colour and slant, on some ground."""
    side = SIDE * FINER
    ground = tuple(rng.randint(150, 255) for _ in range(3))
    colour = tuple(rng.randint(0, 110) for _ in range(3))
    image = Image.new("RGB", (side, side), ground)
    pen = ImageDraw.Draw(image)
    angle = math.radians(rng.uniform(*angles))
    size = side * rng.uniform(0.26, 0.36)
    x, y = (side * (0.5 + rng.uniform(-0.08, 0.08)) for _ in range(2))
    width = round(side * rng.uniform(0.06, 0.1))
    for stroke in strokes:
        turned = [
            (
                x + size * (a * math.cos(angle) + b * math.sin(angle)),
                y + size * (b * math.cos(angle) - a * math.sin(angle)),
            )
            for a, b in stroke
        ]
        pen.line(turned, fill=colour, width=width, joint="curve")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def write_images(folder: Path, each: int, angles: tuple[float, float], rng: random.Random) -> None:
    """A folder for each shape."""
    for name, strokes in SHAPES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            draw(strokes, angles, rng).save(folder / name / f"{number:04}.png")


def write_start(folder: Path) -> None:
    """A vision transformer of 0.1 million random parameters."""
    torch.manual_seed(SEED)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=len(SHAPES),
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def make(out: Path) -> None:
    """All of it."""
    rng = random.Random(SEED)
    write_images(out / "upright", UPRIGHT_EACH, UPRIGHT, rng)
    write_images(out / "turned", TURNED_EACH, TURNED, rng)
    write_start(out / "start")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/shapes"))
    make(parser.parse_args().out)
