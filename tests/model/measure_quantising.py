"""Run alone in a fresh process: quantises a folder to another and prints what memory that took.

It is no test itself; `test_quantising_memory.py` runs it and judges. Arguments: WARM_UP FOLDER TARGET
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from measure_loading import forget_peak, resident_bytes

from halfbyte.model.quantising import prepare, quantise_folder
from halfbyte.quant.weight import QuantSpec


def main(warm_up: Path, folder: Path, target: Path) -> None:
    """Print one line of JSON: bytes at the peak beyond those before."""
    torch.set_num_threads(1)
    quantise_folder(
        prepare(warm_up, QuantSpec()), target / "warm-up"
    )  # imports and caches count as held before
    if not forget_peak():
        sys.exit("the peak cannot be forgotten")
    before = resident_bytes("VmRSS")
    quantise_folder(prepare(folder, QuantSpec()), target / "result")
    print(json.dumps({"beyond": resident_bytes("VmHWM") - before}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
