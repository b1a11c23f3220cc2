"""How speed and memory grow with the length of a row and the size of a model, beside the peers; with a picture.

It owns the points and the picture; it must not know how a side works.

    python bench/growth.py [--quick] [--tokens N] [--shape NAME]

A point is a few steps of one row, every token trained, of halfbyte keeping everything, and of PEFT
with and without gradient checkpointing, as in step_vs_peers.py. The figures go to bench/results/growth.csv, and a
picture of the points of this run to bench/results/growth.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from figures import RESULTS, Figure, run
from step_vs_peers import LORA, PEERS, Scope, Side, mib, peers_python, take_turns

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LENGTHS_SHAPE = "1.1B, 4 layers"
SIZES_TOKENS = 512


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
    """Yields the figures and draws them."""
    if quick:
        lengths, sizes = (64,), ("11M",)
    scope = Scope(rounds=1 if quick else 3, warmup=1)
    points: dict[str, list[tuple[float, str, float, float]]] = {"length": [], "size": []}
    for kind, todo in (
        ("length", [(LENGTHS_SHAPE if not quick else "11M", tokens) for tokens in lengths]),
        ("size", [(shape, SIZES_TOKENS if not quick else 64) for shape in sizes]),
    ):
        for shape, tokens in todo:
            for side in sides_of(shape, tokens, scope):
                memory = side.ask(do="memory")["VmHWM"]
                side.close()
                where = f"{shape}, {tokens} tokens, {side.name}"
                yield Figure(f"{where}: speed", side.tokens_per_s, "tokens/s")
                yield Figure(f"{where}: peak memory", mib(memory), "MiB")
                x = tokens if kind == "length" else parameters(SHAPES[shape])
                points[kind].append((x, side.name, side.tokens_per_s, memory / 2**30))
    draw(points, RESULTS / "growth.svg")


def sides_of(shape: str, tokens: int, scope: Scope) -> list[Side]:
    """The sides of a point, after their steps."""
    python = peers_python()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        vocabulary = SHAPES[shape].vocabulary
        ids = [3 + (7919 * i * i + 104729 * i) % (vocabulary - 3) for i in range(tokens)]
        rows.write_text(json.dumps([{"input_ids": ids, "trained": [True] * tokens}]), encoding="utf-8")
        model = str(model_folder(shape))
        options = {"model": model, "rows": str(rows), "threads": scope.threads, "isa": None, **LORA}
        sides = [
            Side("halfbyte", Path(sys.executable), "halfbyte_side.py", {**options, "batch_size": 1}),
            Side("PEFT checkpointing", python, "peft_side.py", {**options, "checkpointing": True}),
            Side("PEFT plain", python, "peft_side.py", {**options, "checkpointing": False}),
        ]
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
    """A model of that shape with random weights in bfloat16, made once."""
    folder = PEERS / f"shape-{name.replace(', ', '-').replace(' ', '-')}"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(LENGTHS),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial_folder = folder.with_suffix(".partial")
    model.save_pretrained(partial_folder)
    partial_folder.rename(folder)
    return folder


def draw(points: dict[str, list[tuple[float, str, float, float]]], path: Path) -> None:
    """Speed above, memory below; by length on the left, by size on the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    titles = {"length": f"row length in tokens ({LENGTHS_SHAPE})", "size": f"weights ({SIZES_TOKENS} tokens)"}
    for column, (kind, found) in enumerate(points.items()):
        for name in dict.fromkeys(point[1] for point in found):
            mine = [point for point in found if point[1] == name]
            for row, place in enumerate((2, 3)):
                axes[row][column].plot([p[0] for p in mine], [p[place] for p in mine], "o-", label=name)
        for row, label in enumerate(("tokens per second", "peak memory, GiB")):
            axes[row][column].set(xscale="log", yscale="log", xlabel=titles[kind], ylabel=label)
            axes[row][column].grid(alpha=0.3)
    if points["length"]:
        axes[0][0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Speed and memory as rows and models grow.",
        epilog="--quick and --results: as all benchmarks.",
    )
    parser.add_argument("--tokens", type=int, action="append", help="length of a row, these alone")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="of the sizes, these alone")
    options, rest = parser.parse_known_args()
    chosen = options.tokens or options.shape
    lengths = tuple(options.tokens or (() if chosen else LENGTHS))
    sizes = tuple(options.shape or (() if chosen else SIZES))
    return run("growth", partial(measure, lengths, sizes), rest)


if __name__ == "__main__":
    sys.exit(main())
