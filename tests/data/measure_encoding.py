"""Run alone in a fresh process: tokenises a small file of rows, then a large one, and prints what memory that took.

It is no test itself; `test_encode.py` runs it and judges. Usage: measure_encoding.py MODEL SMALL LARGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from halfbyte.data.encode import Encoding
from halfbyte.data.faults import Reading
from halfbyte.data.render import Renderer
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.settings import DataConfig


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM`: anonymous, file and shared pages of this process together."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def main(model: str, small: str, large: str) -> None:
    """Print one line of JSON: bytes at the peak beyond the peak of the small file, and rows of the large one."""
    settings = DataConfig(train=["-"], cache=False, max_length=4096)
    renderer = Renderer(load_tokenizer(model), "plain")
    Encoding(settings, renderer, Reading()).encode([small])
    before = resident_bytes("VmHWM")
    found = Encoding(settings, renderer, Reading()).encode([large])
    beyond = resident_bytes("VmHWM") - before
    print(json.dumps({"beyond": beyond, "before": before, "rows": len(found.file.rows)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
