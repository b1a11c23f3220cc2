"""How much memory the layers may hold, and when what was freed goes back.

It owns that number and that moment; it must not know layers, nor what they do with memory.
"""

from __future__ import annotations

import time

from halfbyte.system import available_bytes, give_back_freed_memory, keep_freed_memory, process_bytes

HELD_SHARE = 0.6
"""Of the memory that is left, for what layers hold; the rest is for logits, what passes through, and others."""

TIDY_SECONDS = 10.0
"""How often steps give back what they freed, at most: the next one has to touch it anew."""

GROWN_SHARE = 1.01
"""Of the peak before, above which freed memory is in the way: pieces too small for what is asked for add up."""


class Tidy:
    """Keeps what steps free for the next one, and returns it only after one that made the process larger than before.

    Args:
        began: When steps did, on `time.perf_counter`'s clock; None is now.
    """

    def __init__(self, began: float | None = None) -> None:
        keep_freed_memory()
        self._last = time.perf_counter() if began is None else began
        self._peak = process_bytes().get("VmHWM", 0)

    def after_step(self) -> None:
        """Give back what is free, where that is due."""
        if time.perf_counter() - self._last < TIDY_SECONDS:
            return
        peak, self._last = process_bytes().get("VmHWM", 0), time.perf_counter()
        if peak > GROWN_SHARE * self._peak:
            give_back_freed_memory()
        self._peak = peak


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
