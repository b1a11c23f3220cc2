"""How fast rows of chats become tokens with a mask of what is learnt, and how soon a second run has them again.

It owns the rows and the two sides' commands; it must not know how either side works.

    python bench/prepare.py [--quick]

Rows are alpaca_en_demo's, over and over with a number each, in ChatML with the tokenizer of base-11m. Each side is a
process of its own, from the file to tokens on the disk, import times left out; the peer is `datasets.map` over
transformers' `apply_chat_template` in the environment of bench/step_vs_peers.py, both with what is theirs by default.
Here every row is judged first and its prompt is tokenised apart as well, which is what answers are generated from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from figures import Figure, run, shared
from halfbyte.data.encode import Encoding
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.render import Renderer
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.settings import DataConfig
from step_vs_peers import PEERS, SIDES, peers_python

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
MOST_SECONDS_AGAIN = 5.0
MOST_TOKENS = 2048


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        count = write_rows(rows, 2_000 if quick else 50_000)
        ours = [halfbyte_side(rows, folder / "cache") for _ in range(2)]
        theirs = [datasets_side(rows, folder / "datasets") for _ in range(2)]
        first, peer = ours[0], theirs[0]
        assert first["trained"] == peer["trained"], "the two sides did other work"
        speed, peer_speed = (side["tokens"] / side["seconds"] for side in (first, peer))
        where = f"{count:,} rows of chats"
        yield Figure(f"{where}: tokens per second from file to disk", speed, "tokens/s")
        yield Figure(f"{where}: the same by datasets.map", peer_speed, "tokens/s")
        yield Figure(f"{where}: over datasets.map", speed / peer_speed, "x")
        yield Figure.at_most(f"{where}: a second run", ours[1]["seconds"], "s", MOST_SECONDS_AGAIN)
        yield Figure(f"{where}: a second run of datasets.map", theirs[1]["seconds"], "s")


def write_rows(file: Path, count: int) -> int:
    """Write chats, each another one; their number."""
    found = [row.messages or () for row in read_rows(shared("datasets/alpaca/alpaca_en_demo.json"))]
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            turns = [{"role": m.role, "content": m.content} for m in found[number % len(found)]]
            turns[0]["content"] += f" ({number})"
            stream.write(json.dumps({"messages": turns}) + "\n")
    return count


def halfbyte_side(rows: Path, cache: Path) -> dict[str, float]:
    """Seconds, tokens and trained tokens here."""
    renderer = Renderer(load_tokenizer(shared("models/base-11m")), "chatml")
    data = DataConfig(train=[str(rows)], max_length=MOST_TOKENS, cache=str(cache))
    began = time.perf_counter()
    file = Encoding(data, renderer, Reading()).encode([str(rows)]).file
    seconds = time.perf_counter() - began
    tokens, trained = (int(file.rows[name].sum()) for name in ("length", "trained"))
    return {"seconds": seconds, "tokens": tokens, "trained": trained}


def datasets_side(rows: Path, cache: Path) -> dict[str, float]:
    """The same there."""
    options = {
        "model": str(shared("models/base-11m")),
        "rows": str(rows),
        "template": TEMPLATE,
        "cache": str(cache),
    }
    environment = os.environ | {"HF_HOME": str(PEERS / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [peers_python(), SIDES / "datasets_side.py", json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(run("prepare", measure))
