"""Memory that steps freed goes back to the system now and then; in between it is kept for the next."""

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
small = [malloc(60_000) for _ in range(4000)]
for each in small:
    ctypes.memset(each, 1, 60_000)
for each in small[:-1]:  # the last one keeps the heap from shrinking by itself
    free(each)
before = process_bytes()["VmRSS"]
Tidy(time.perf_counter() - TIDY_SECONDS * float(sys.argv[1])).after_step()
print(before - process_bytes()["VmRSS"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is meant")
@pytest.mark.parametrize(("since", "goes_back"), [(1.5, True), (0.5, False)])
def test_freed_memory_goes_back_after_a_step_once_that_is_due(since: float, goes_back: bool) -> None:
    """240 MB in small pieces, freed under one that lives."""
    command = [sys.executable, "-c", SCRIPT, str(since)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200e6) == goes_back, done.stdout
    assert goes_back or int(done.stdout) < 1e6
