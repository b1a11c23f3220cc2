"""How speed and memory grow with the length of a row and the size of a model, beside the peers; with a picture.

It owns the points and the picture; it must not know how a side works.

    python bench/growth.py [--quick] [--tokens N] [--shape NAME]

A point is a few steps of one row, every token trained, of halfbyte keeping everything, and of PEFT
with and without gradient checkpointing, as in step_vs_peers.py. The figures go to bench/results/growth.csv, and the
newest of each point there, of whichever run, into the picture bench/results/growth.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from figures import RESULTS, Figure, run
from step_vs_peers import LORA, Scope, Side, mib, peers_python, random_llama, take_turns

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LENGTHS_SHAPE = "1.1B, 4 layers"
SIZES_TOKENS = 512
SIDES = ("halfbyte", "PEFT checkpointing", "PEFT plain")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32_000


SHAPES = {
    "11M": Shape(384, 1024, 6, 6, 2, 4096),
    "110M": Shape(768, 2048, 12, 12, 12),
    "1.1B, 4 layers": Shape(2048, 5632, 4, 32, 4),
    "1.1B": Shape(2048, 5632, 22, 32, 4),
    "3B": Shape(3200, 8640, 26, 32, 32),
}
"""Llama-like shapes: this project's test model, llama2.c's, TinyLlama's and OpenLLaMA's."""

SIZES = ("11M", "110M", "1.1B", "3B")


def measure(lengths: tuple[int, ...], sizes: tuple[str, ...], quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    scope = Scope(rounds=1 if quick else 3, warmup=1)
    points = [(LENGTHS_SHAPE, tokens) for tokens in lengths] + [(shape, SIZES_TOKENS) for shape in sizes]
    for shape, tokens in [("11M", 64)] if quick else points:
        for side in sides_of(shape, tokens, scope):
            memory = side.ask(do="memory")["VmHWM"]
            side.close()
            yield Figure(claim(shape, tokens, side.name, "speed"), side.tokens_per_s, "tokens/s")
            yield Figure(claim(shape, tokens, side.name, "peak memory"), mib(memory), "MiB")


def claim(shape: str, tokens: int, side: str, what: str) -> str:
    return f"{shape}, {tokens} tokens, {side}: {what}"


def sides_of(shape: str, tokens: int, scope: Scope) -> list[Side]:
    """The sides of a point, after their steps."""
    python = peers_python()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        vocabulary = SHAPES[shape].vocabulary
        ids = [3 + (7919 * i * i + 104729 * i) % (vocabulary - 3) for i in range(tokens)]
        rows.write_text(json.dumps([{"input_ids": ids, "trained": [True] * tokens}]), encoding="utf-8")
        model = str(model_folder(shape))
        options = {"model": model, "rows": str(rows), **scope.machine, **LORA}
        peers = {name: {**options, "checkpointing": name == SIDES[1]} for name in SIDES[1:]}
        sides = [Side(SIDES[0], Path(sys.executable), "halfbyte_side.py", {**options, "batch_size": 1})]
        sides += [Side(name, python, "peft_side.py", own) for name, own in peers.items()]
        take_turns(sides, scope)
    return sides


def parameters(shape: Shape) -> int:
    """Weights of a model, embedding and head included."""
    head = shape.hidden // shape.heads
    attention = 2 * shape.hidden * shape.hidden + 2 * shape.hidden * shape.kv_heads * head
    return (
        shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
        + 2 * shape.vocabulary * shape.hidden
    )


def model_folder(name: str) -> Path:
    """A model of that shape with random weights, made once."""
    shape = SHAPES[name]
    return random_llama(
        f"shape-{name.replace(', ', '-').replace(' ', '-')}",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(LENGTHS),
    )


def newest(results: Path) -> dict[str, float]:
    """The newest figure of each claim, of runs that were not quick."""
    with results.open(newline="", encoding="utf-8") as file:
        kept = [row for row in csv.DictReader(file) if row["quick"] == "False" and row["figure"] != "unknown"]
    return {row["claim"]: float(row["figure"]) for row in kept}


def draw(figures: dict[str, float], path: Path) -> None:
    """Speed above, memory below; by length on the left, by size on the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    by_length = [(float(tokens), LENGTHS_SHAPE, tokens) for tokens in LENGTHS]
    by_size = [(float(parameters(SHAPES[shape])), shape, SIZES_TOKENS) for shape in SIZES]
    columns = {
        f"row length in tokens ({LENGTHS_SHAPE})": by_length,
        f"weights ({SIZES_TOKENS} tokens a row)": by_size,
    }
    rows = {"tokens per second": ("speed", 1.0), "peak memory, GiB": ("peak memory", 1 / 1024)}
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for column, (x_label, points) in enumerate(columns.items()):
        for row, (y_label, (what, unit)) in enumerate(rows.items()):
            for side in SIDES:
                found = [(x, figures.get(claim(shape, tokens, side, what))) for x, shape, tokens in points]
                drawn = [(x, y * unit) for x, y in found if y is not None]
                axes[row][column].plot([x for x, _ in drawn], [y for _, y in drawn], "o-", label=side)
            axes[row][column].set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
            axes[row][column].grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Speed and memory as rows and models grow.",
        epilog="--quick: as all benchmarks.",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures and the picture")
    parser.add_argument("--tokens", type=int, action="append", help="length of a row, these alone")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="of the sizes, these alone")
    options, rest = parser.parse_known_args()
    chosen = options.tokens or options.shape
    lengths = tuple(options.tokens or (() if chosen else LENGTHS))
    sizes = tuple(options.shape or (() if chosen else SIZES))
    status = run("growth", partial(measure, lengths, sizes), [*rest, "--results", str(options.results)])
    if figures := newest(options.results / "growth.csv"):  # quick ones are not drawn
        draw(figures, options.results / "growth.svg")
    return status


if __name__ == "__main__":
    sys.exit(main())
