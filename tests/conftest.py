"""What all tests share: where the real test material lies, and quiet, deterministic libraries."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from halfbyte.kernels import native

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(
    prefix="halfbyte-tests-"
)  # no test finds what another session kept
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Path of a file or folder of the shared test material.

    A missing one skips the test, or fails it where `HALFBYTE_REQUIRE_SHARED=1`.
    """
    root = Path(os.environ.get("HALFBYTE_SHARED", ROOT.parent / "shared"))

    def find(relative: str) -> Path:
        path = root / relative
        if not path.exists():
            message = f"{path} is missing; set HALFBYTE_SHARED to the folder that holds {relative}"
            if os.environ.get("HALFBYTE_REQUIRE_SHARED") == "1":
                pytest.fail(message)
            pytest.skip(message)
        return path

    return find


def runnable_instruction_sets() -> list[str]:
    """Names of the instruction sets that run on this machine; none without the compiled module."""
    module = native.module()
    return [name for name, state in module.instruction_sets() if state == "runs"] if module else []


@contextmanager
def running(name: str) -> Iterator[None]:
    """Runs with one instruction set, or with the plain-PyTorch backend for `reference`."""
    module = native.module()
    if name == "reference":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("halfbyte.kernels.cpu.module", lambda: None)
            yield
        return
    assert module is not None
    before = module.active()
    assert module.use(name)
    try:
        yield
    finally:
        module.use(before)


@pytest.fixture(params=runnable_instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set of this machine."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=["reference", *runnable_instruction_sets()])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the plain-PyTorch backend and once per instruction set of this machine."""
    with running(request.param):
        yield request.param
