"""The compiled module: whether it is there, which instruction set it uses, and what to say when it is not.

It owns finding and configuring `halfbyte._native`; it must not import torch nor know any operation.

`HALFBYTE_ISA` limits the instruction set (`portable`, `avx2`, `avx512`, `avx512_bf16`, `neon`);
`HALFBYTE_BACKEND=reference` sets the compiled module aside.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from halfbyte.errors import KernelError

ISA_VARIABLE = "HALFBYTE_ISA"
BACKEND_VARIABLE = "HALFBYTE_BACKEND"
BACKENDS = ("native", "reference")


@cache
def module() -> ModuleType | None:
    """The compiled module with its instruction set chosen, or None where it was not built.

    Raises:
        KernelError: HB404 when `HALFBYTE_ISA` or `HALFBYTE_BACKEND` names something unknown or not on this machine.
    """
    backend = os.environ.get(BACKEND_VARIABLE, "native")
    if backend not in BACKENDS:
        what = f"{BACKEND_VARIABLE}={backend}, expected one of {', '.join(BACKENDS)}"
        raise KernelError("HB404", what, fix=f"correct or unset {BACKEND_VARIABLE}")
    if backend == "reference":
        return None
    try:
        native = importlib.import_module("halfbyte._native")
    except ImportError:
        return None
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and not native.use(wanted):
        runnable = ", ".join(name for name, state in native.instruction_sets() if state == "runs")
        what = f"{ISA_VARIABLE}={wanted} does not run on this machine, expected one of {runnable}"
        raise KernelError(
            "HB404", what, fix=f"correct or unset {ISA_VARIABLE}; halfbyte doctor shows what runs"
        )
    return native


def notice() -> str | None:
    """One line for every command's output when the compiled module is not in use, else None."""
    if module() is not None:
        return None
    if os.environ.get(BACKEND_VARIABLE) == "reference":
        return f"{BACKEND_VARIABLE}=reference: running the slow plain-PyTorch kernels, as asked."
    return (
        "Native kernels are not installed: running the slow plain-PyTorch kernels. "
        "To build them: HALFBYTE_NATIVE=1 pip install --force-reinstall --no-deps halfbyte (needs a C++20 compiler)."
    )
