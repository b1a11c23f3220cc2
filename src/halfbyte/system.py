"""What the operating system says of the processor, of memory and of this process, and how memory is given back to it.

It owns where these facts are found, and that call; it must not import torch, nor know what they are for.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for its settings


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


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes this process can take without swapping, or being stopped by its control group; half of all where unknown.

    Args:
        root: Where `proc` and `sys` are.
    """
    free = _meminfo(root / "proc/meminfo")
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit = _number(root / "sys/fs/cgroup/memory.max")
    used = _number(root / "sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + _reclaimable(root / "sys/fs/cgroup/memory.stat")))
    return free


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed for whoever asks next, where it can, until `give_back_freed_memory`.

    By itself it returns the end of its heap over and over, and the system zeroes every page that comes back: in a
    virtual machine, whose host may have taken the page meanwhile, seconds for a gigabyte.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if allocator is not None:
        allocator(_MMAP_THRESHOLD, 32 << 20)  # the largest there is; larger blocks go back when freed
        allocator(_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Have the allocator return to the system what is free in its heap, where it can; nothing that lives moves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's; others have none
        trim(0)


def _meminfo(path: Path) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """A control group's number; None where there is none, or no limit (`max`)."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(path: Path) -> int:
    """Bytes of files that the control group counts and the system gives back when asked."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
