"""Memory that steps freed is kept for the next one; it goes back to the system where a step made the process grow."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, time
from halfbyte.system import process_bytes
from halfbyte.train.memory import TIDY_SECONDS, Tidy
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)

def step(pieces=4000, bytes_of=60_000):
    held = [malloc(bytes_of) for _ in range(pieces)]
    for each in held:
        ctypes.memset(each, 1, bytes_of)
    for each in held:
        free(each)

since, grows = float(sys.argv[1]), sys.argv[2] == "grows"
if not grows:
    step()
tidy = Tidy(time.perf_counter() - TIDY_SECONDS * since)
before = process_bytes()["VmRSS"]
step()
kept = process_bytes()["VmRSS"] - before
tidy.after_step()
print(kept, process_bytes()["VmRSS"] - before)
"""
STEP = 240e6


def kept_before_and_after(since: float, growth: str) -> tuple[int, int]:
    command = [sys.executable, "-c", SCRIPT, str(since), growth]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    return before, after


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is meant")


@LINUX
@pytest.mark.parametrize(
    ("since", "growth", "goes_back"), [(1.5, "grows", True), (0.5, "grows", False), (1.5, "stays", False)]
)
def test_what_a_step_freed_goes_back_where_it_grew_and_that_is_due(
    since: float, growth: str, goes_back: bool
) -> None:
    """240 MB in small pieces at the end of the heap, which the allocator would return by itself."""
    before, after = kept_before_and_after(since, growth)
    assert before > 0.9 * STEP, before
    assert (after < 0.1 * STEP) == goes_back, after
