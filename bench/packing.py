"""How full packed passes are on real lengths, how long packing takes, and what rows side by side would have padded.

It owns the lengths and budgets measured; it must not know how rows are packed.

    python bench/packing.py [--quick]

Lengths are those of alpaca_en_demo (999 rows) with the Llama-2 tokenizer, cut at the budget; speed is that of 52,002
of them drawn with replacement, as many rows as Alpaca has, best of several epochs on one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy as np

from figures import Figure, run, shared
from halfbyte.data.order import PACKED_WINDOW, Packed, Padded, Usage
from halfbyte.data.read import read_rows
from halfbyte.data.render import Renderer
from halfbyte.data.tokenise import tokenise_rows
from halfbyte.data.tokenizer import load_tokenizer

BUDGETS = (512, 1024, 2048, 4096)
ROWS = 52_002
FILL_FLOOR = 97.0  # per cent
SECONDS_CEILING = 0.5


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    rows = read_rows(shared("datasets/alpaca/alpaca_en_demo.json"))
    renderer = Renderer(load_tokenizer(shared("models/llama2-tokenizer")))
    whole = np.array([len(e.input_ids) for e in tokenise_rows(rows, renderer, 10_000).examples])
    epochs = range(2 if quick else 10)
    for budget in BUDGETS:
        lengths = np.minimum(whole, budget)
        yield from packed("999 rows", Packed(lengths, budget, 0), epochs)
        many = np.random.default_rng(0).choice(lengths, ROWS)
        yield from packed(f"{ROWS:,} rows", Packed(many, budget, 0), epochs)
    fills = [100 * Usage.of(Padded(whole, 8, 0), epoch).fill for epoch in epochs]
    yield Figure("999 rows, 8 side by side: least share that is no padding", min(fills), "%")


def packed(name: str, order: Packed, epochs: range) -> Iterator[Figure]:
    """Least fill and shortest time over some epochs."""
    fills, seconds = [], []
    for epoch in epochs:
        began = time.perf_counter()
        usage = Usage.of(order, epoch)
        seconds.append(time.perf_counter() - began)
        fills.append(100 * usage.fill)
    where = f"{name}, {order.batch_tokens} tokens a pass, windows of {PACKED_WINDOW}"
    yield Figure.at_least(f"{where}: least fill", min(fills), "%", FILL_FLOOR)
    yield Figure.at_most(f"{where}: time to pack", min(seconds), "s", SECONDS_CEILING)


if __name__ == "__main__":
    sys.exit(run("packing", measure))
