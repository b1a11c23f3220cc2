"""What the operating system says of the processor and of this process, and how memory is given back to it.

It owns where these facts are found, and that call; it must not import torch, nor know what they are for.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path


def processor_name() -> str:
    """The processor's marketing name where the system keeps one, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def process_bytes(root: Path = Path("/")) -> dict[str, int]:
    """Sizes of this process in bytes, by the kernel's names (`VmHWM`, `VmRSS`, …); empty where it tells none.

    Args:
        root: Where `proc` is.
    """
    try:
        text = (root / "proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def give_back_freed_memory() -> None:
    """Have the allocator return to the system what is free in its heap, where it can; nothing that lives moves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's; others have none
        trim(0)
