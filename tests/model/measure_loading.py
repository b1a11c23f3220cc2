"""Run alone in a fresh process: loads a model folder in 4 bits and prints what memory that took.

It is no test itself; `test_loading_memory.py` runs it and judges. Usage: measure_loading.py WARM_UP_FOLDER FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from halfbyte.model.loading import load
from halfbyte.quant.weight import QuantSpec


def resident_bytes(field: str) -> int:
    """`VmRSS` or `VmHWM`: anonymous, file and shared pages of this process together."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def forget_peak() -> bool:
    """Set the kernel's mark of the most memory to what is held now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main(warm_up: Path, folder: Path) -> None:
    """Print one line of JSON: how it was measured, bytes at the peak beyond those before, bytes of the model."""
    torch.set_num_threads(1)
    load(warm_up, quantization=QuantSpec(), dtype=torch.bfloat16)  # imports and caches count as held before
    resettable = forget_peak()
    before = resident_bytes("VmRSS")
    model = load(folder, quantization=QuantSpec(), dtype=torch.bfloat16)
    peak = (
        resident_bytes("VmHWM") if resettable else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    method = "VmHWM" if resettable else "ru_maxrss"
    print(json.dumps({"method": method, "beyond": peak - before, "held": sum(held.values())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
