"""Promises of quantising, measured from outside: memory of two weights, and nothing left in the system's cache."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.model.test_loading_memory import write_sharded_llama
from transformers import LlamaConfig

from halfbyte.kernels import native
from halfbyte.model.quantised_writer import STAGE_BYTES, STAGES
from halfbyte.model.quantising import WAITING_BYTES

MEASURE = Path(__file__).with_name("measure_quantising.py")

# Beyond what is read: what the largest weight becomes (of 16 bits 4 and a scale of 8 per 64), once being made and as
# often as it may wait to be written, and once more; its scales in float32 while they are stored in 8 bits, six times;
# the writer's stages; all modules.
BECOMES = 0.25 + 1 / 128
SCALES = 6 / 32
BESIDE_BYTES = 6e6

# What is freed goes back to the system at once: by default glibc keeps up to 20 MB of it, more or less by chance.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}


def cached(file: Path) -> int:
    """Bytes of a file in the system's cache."""
    size = file.stat().st_size
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as mapping:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
@pytest.mark.skipif(native.module() is None, reason="the reference kernels make whole matrices in float32")
def test_memory_is_that_of_two_weights_and_no_cache_is_left(tmp_path: Path) -> None:
    tiny = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    write_sharded_llama(tmp_path / "tiny", tiny)
    large = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_hidden_layers=3,
        vocab_size=40_000,
    )
    embedding = write_sharded_llama(tmp_path / "large", large)
    for file in (tmp_path / "large").iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not yet on the disk cannot leave the cache
    weight = 2048 * 8192 * 2
    assert embedding > 4 * weight, "what is kept as it is goes piece by piece"
    command = [sys.executable, str(MEASURE), *map(str, (tmp_path / "tiny", tmp_path / "large", tmp_path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ALLOCATOR
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    beyond = json.loads(done.stdout.splitlines()[-1])["beyond"]
    waiting = WAITING_BYTES + BECOMES * weight
    beside = waiting + STAGES * STAGE_BYTES + BESIDE_BYTES
    assert beyond <= (2 + BECOMES + SCALES) * weight + beside, beyond
    assert beyond >= weight, "nothing was measured"
    files = [*(tmp_path / "large").glob("*.safetensors"), tmp_path / "result" / "model.safetensors"]
    whole = sum(file.stat().st_size for file in files)
    assert sum(map(cached, files)) < 0.1 * whole
