"""Memory that a long step freed goes back to the system; after a short one it is kept for the next."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys, time
from halfbyte.system import process_bytes
from halfbyte.train.memory import LONG_SECONDS, give_back_after
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
small = [malloc(60_000) for _ in range(4000)]
for each in small:
    ctypes.memset(each, 1, 60_000)
for each in small[:-1]:  # the last one keeps the heap from shrinking by itself
    free(each)
before = process_bytes()["VmRSS"]
give_back_after(time.perf_counter() - LONG_SECONDS * float(sys.argv[1]))
print(before - process_bytes()["VmRSS"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is meant")
@pytest.mark.parametrize(("share_of_long", "goes_back"), [(1.5, True), (0.5, False)])
def test_freed_memory_goes_back_after_a_long_step_alone(share_of_long: float, goes_back: bool) -> None:
    """240 MB in small pieces, freed under one that lives."""
    command = [sys.executable, "-c", SCRIPT, str(share_of_long)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200e6) == goes_back, done.stdout
    assert goes_back or int(done.stdout) < 1e6
