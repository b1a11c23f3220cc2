"""A process watched from outside: its highest resident memory, and what kinds of pages that was made of.

It owns the reading of the kernel's counts; it must not know what the process does.

The peak is `VmHWM` of /proc/PID/status, the kernel's own high-water mark of resident pages: anonymous ones, those of
mapped files and shared ones. Pages of files that are only in the system's cache are nobody's and do not count. The
split is that of the samples, taken every few milliseconds, and so may miss a short peak; the mark does not.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import ROOT

EVERY_SECONDS = 0.02


@dataclass(frozen=True)
class Watched:
    """What a process took.

    Attributes:
        seconds: Wall time.
        peak_bytes: `VmHWM` as last seen before it ended.
        anonymous_bytes: Most anonymous and shared memory in a sample: what a control group counts besides the cache.
        file_bytes: Most memory of mapped files in a sample.
    """

    seconds: float
    peak_bytes: int
    anonymous_bytes: int
    file_bytes: int


def watch(command: Sequence[str], log: Path) -> Watched:
    """Run a command to its end.

    Args:
        command: Program and arguments.
        log: Gets what it prints.

    Raises:
        SystemExit: Where it fails, with the end of its log.
    """
    if not Path("/proc/self/status").exists():
        sys.exit("this benchmark reads the kernel's counts in /proc and needs Linux")
    began = time.perf_counter()
    peak = anonymous = file = 0
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                found = _status(process.pid)
                peak = max(peak, found.get("VmHWM", 0))
                anonymous = max(anonymous, found.get("RssAnon", 0) + found.get("RssShmem", 0))
                file = max(file, found.get("RssFile", 0))
                time.sleep(EVERY_SECONDS)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return Watched(time.perf_counter() - began, peak, anonymous, file)


def _status(pid: int) -> dict[str, int]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:  # it just ended
        return {}
    fields = (line.partition(":") for line in text.splitlines() if line.startswith(("VmHWM", "Rss")))
    return {name: 1024 * int(value.split()[0]) for name, _, value in fields}
