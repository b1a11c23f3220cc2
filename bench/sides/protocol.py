"""How bench/step_vs_peers.py talks to a side, a process that does training steps when told to.

It owns the commands, the clock and the peak memory; it must not import anything outside of the standard library,
since every side has an environment of its own.

One JSON object per line each way. The first line a side reads are its options; when it has loaded it answers `ready`.
Then `{"do": "step", "steps": n}` is answered with the seconds and counts of each step, `{"do": "memory"}` with bytes,
and `{"do": "quit"}` ends the process. Between answers and commands a side waits for input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

STATUS = Path("/proc/self/status")


class Link:
    """A side's end: commands come on stdin, answers go to what was stdout; prints of libraries go to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.options: dict[str, Any] = self._read()
        self._left = 0
        self._steps: list[dict[str, float]] = []
        self._clock = 0.0

    def ready(self, **facts: Any) -> None:
        """Say that everything is loaded, forget the memory it took to load, and wait for the first step."""
        self._answer(ready=True, peak_since_ready=_reset_peak(), **facts)
        self._wait()

    def done(self, **facts: float) -> None:
        """Note a step, and wait for the command for the next one."""
        self._steps.append({"seconds": time.perf_counter() - self._clock, **facts})
        self._left -= 1
        if self._left == 0:
            self._answer(steps=self._steps)
            self._wait()
        self._clock = time.perf_counter()

    def _wait(self) -> None:
        while True:
            command = self._read()
            if command["do"] == "step":
                self._left, self._steps = command["steps"], []
                self._clock = time.perf_counter()
                return
            if command["do"] == "memory":
                self._answer(**memory())
            if command["do"] == "quit":
                self._leave()

    def _read(self) -> dict[str, Any]:
        line = sys.stdin.readline()
        if not line:  # the other end is gone
            self._leave()
        command: dict[str, Any] = json.loads(line)
        return command

    def _answer(self, **facts: Any) -> None:
        print(json.dumps(facts), file=self._answers, flush=True)

    def _leave(self) -> NoReturn:
        os._exit(0)  # without the long farewells of loops and pools that wait for their end


def memory() -> dict[str, int | None]:
    """Largest resident set since it was last forgotten, and what is resident now, anonymous and of files; bytes."""
    found: dict[str, int | None] = dict.fromkeys(("VmHWM", "RssAnon", "RssFile"))
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = 1024 * int(value.split()[0])
    return found


def _reset_peak() -> bool:
    """Forget the largest resident set so far; False where the system does not permit that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
