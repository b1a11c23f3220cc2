"""How much memory this process may still take, how much of it the layers may hold, and when freed memory goes back.

It owns these two numbers and that moment; it must not know layers, nor what they do with memory.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from halfbyte.system import give_back_freed_memory, process_bytes

HELD_SHARE = 0.6
"""Of the memory that is left, for what layers hold; the rest is for logits, what passes through, and others."""

LONG_SECONDS = 1.0
"""Steps that take longer give back what they freed: that takes a thousandth of them; some pages are touched anew."""


def give_back_after(began: float) -> None:
    """After a long step, return to the system what the allocator holds freed: pieces too small for the next request
    add up over steps, to a seventh of the peak in models larger than memory.

    Args:
        began: When the step did, on `time.perf_counter`'s clock.
    """
    if time.perf_counter() - began > LONG_SECONDS:
        give_back_freed_memory()


def activation_budget_bytes(
    setting_gb: float | None, memory_gb: float | None = None, to_come_bytes: int = 0
) -> int:
    """Bytes that layers may hold between forward and backward.

    Args:
        setting_gb: `train.activation_memory_gb`; None takes its share of the memory that is left.
        memory_gb: What the whole process may take; None is all that is free.
        to_come_bytes: What is not there yet and will stay: gradients and the optimizer's state.
    """
    if setting_gb is not None:
        return int(setting_gb * 1e9)
    room = available_bytes()
    if memory_gb is not None:
        room = min(room, int(memory_gb * 1e9) - process_bytes().get("VmRSS", 0))
    return int(HELD_SHARE * max(0, room - to_come_bytes))


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
