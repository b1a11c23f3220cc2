"""halfbyte: fine-tune models in 4 bits on the machine you own, with evidence.

It owns the small public surface and imports nothing heavy; every name is loaded when first used.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte.model.hf_quantizer import HalfbyteConfig
    from halfbyte.model.public import add_lora, load, save_adapter
    from halfbyte.pipeline import run

__all__ = ["HalfbyteConfig", "__version__", "add_lora", "load", "run", "save_adapter"]

_HOMES = {
    "HalfbyteConfig": "halfbyte.model.hf_quantizer",
    "add_lora": "halfbyte.model.public",
    "load": "halfbyte.model.public",
    "run": "halfbyte.pipeline",
    "save_adapter": "halfbyte.model.public",
}

# Turns that a thread of libgomp spins before it sleeps, read when torch loads it. By default a thread that waits for
# another keeps, for milliseconds, the very processor that the other needs where programs share the machine.
SPIN_VARIABLE, SPINS = "GOMP_SPINCOUNT", "2000"
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault(SPIN_VARIABLE, SPINS)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
