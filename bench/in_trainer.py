"""The same SFTTrainer script with our 4 bits and with bitsandbytes', which differ in one line, on the same CPU.

It owns what is compared; how sides take turns is in step_vs_peers.py, and what a side does in sides/trl_side.py.

    python bench/in_trainer.py [--quick] [--rounds N] [--threads N]

Instruction rows (alpaca_en_demo.json), 8 at a time, TinyLlama-1.1B's shape with 4 layers and random weights, LoRA of
rank 16 beside all linear layers; TRL's own settings, which compute layers again (checkpointing), and without that.
Useful tokens are those that are no filling. The speed is the median over pairs of steps, one of each side, of their
ratio: whatever else the machine does meets both steps of a pair. Processor time, which other programs do not lengthen
as they do the clock's, is compared in the same pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from figures import Figure, run
from step_vs_peers import LORA, SAME_LOSS, Side, instruction_rows, mib, model_folder

LAYERS, BATCH = 4, 8


def measure(rounds: int, threads: int, quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    layers, longest = (1, 60) if quick else (LAYERS, None)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(instruction_rows(layers, longest)), encoding="utf-8")
        options = {
            "model": str(model_folder(layers)),
            "rows": str(rows),
            "threads": threads,
            "isa": None,
            "dtype": "bfloat16",
            "batch_size": BATCH,
            "packing": False,
            **LORA,
        }
        for checkpointing in (True, False):
            again = "with checkpointing" if checkpointing else "without checkpointing"
            where = f"SFTTrainer, {layers} layers, {threads} threads, {again}"
            yield from compared(where, {**options, "checkpointing": checkpointing}, 2 if quick else rounds)


def compared(where: str, options: dict[str, Any], rounds: int) -> Iterator[Figure]:
    """Both sides' steps, taken in turns."""
    python = Path(sys.executable)
    sides = [
        Side(name, python, "trl_side.py", {**options, "quantization": name})
        for name in ("halfbyte", "bitsandbytes")
    ]
    ratios, work = [], []
    for number in range(rounds + 1):
        speed, used = {}, {}
        for side in sides if number % 2 == 0 else reversed(sides):
            before = side.processor_s()
            (step,) = side.ask(do="step", steps=1)["steps"]
            used[side.name] = (side.processor_s() - before) / step["tokens"]
            speed[side.name] = step["tokens"] / step["seconds"]
            if number == 0:
                side.first_loss = step["loss"]
            else:
                side.steps.append(step)
        if number:
            ratios.append(speed["halfbyte"] / speed["bitsandbytes"])
            work.append(used["bitsandbytes"] / max(used["halfbyte"], 1e-9))
    ours, theirs = sides
    for side in sides:
        side.peak_bytes = side.ask(do="memory")["VmHWM"]
        side.close()
        yield Figure(f"{where}: {side.name}, useful tokens", side.tokens_per_s, "tokens/s")
        yield Figure(f"{where}: {side.name}, peak memory", mib(side.peak_bytes), "MiB")
    claim = f"{where}: bitsandbytes' processor time of a token over ours"
    yield Figure(claim, statistics.median(work), "x")
    yield Figure(f"{where}: slowest pair of {rounds}", min(ratios), "x")
    yield Figure(f"{where}: fastest pair of {rounds}", max(ratios), "x")
    yield Figure(f"{where}: speed against bitsandbytes", statistics.median(ratios), "x")
    off = abs(ours.first_loss - theirs.first_loss)
    yield Figure.at_most(f"{where}: first loss, off bitsandbytes'", off, "nats", SAME_LOSS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="One line of a TRL script changed.", epilog="--quick and --results: as all benchmarks."
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each side")
    threads = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=threads, help="of each side")
    options, rest = parser.parse_known_args()
    return run("in_trainer", partial(measure, options.rounds, options.threads), rest)


if __name__ == "__main__":
    sys.exit(main())
