"""Promises of choosing the compiled module: what the environment asks for is done, or refused by name."""

from __future__ import annotations

import pytest

from halfbyte.errors import KernelError
from halfbyte.kernels import native

# Past the cache, so that no other test sees this environment.
choose = native.module.__wrapped__


def test_an_unknown_instruction_set_is_refused_with_those_that_run(monkeypatch):
    compiled = native.module()
    if compiled is None:
        pytest.skip("native kernels are not built")
    monkeypatch.setenv(native.ISA_VARIABLE, "sse1")
    active = compiled.active()
    with pytest.raises(KernelError, match="HB404.*HALFBYTE_ISA=sse1.*portable"):
        choose()
    assert compiled.active() == active


def test_an_unknown_backend_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setenv(native.BACKEND_VARIABLE, "cuda")
    with pytest.raises(KernelError, match="HB404.*HALFBYTE_BACKEND=cuda.*native, reference"):
        choose()


def test_the_compiled_module_is_set_aside_when_asked(monkeypatch):
    monkeypatch.setenv(native.BACKEND_VARIABLE, "reference")
    assert choose() is None
