"""Ctrl-C as a request to stop at the next safe point.

It owns the signal handler while training runs; it must not know what is saved or how.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import ClassVar

from halfbyte.errors import TrainError


class TrainInterrupted(TrainError):  # noqa: N818 (an interruption is no fault)
    """Ctrl-C stopped the run after a checkpoint was saved."""

    exit_code: ClassVar[int] = 130


class CtrlC:
    """Turns the first Ctrl-C into `requested`; a second one stops at once, as always.

    Outside the main thread, where Python allows no signal handlers, it never requests anything.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
