"""`halfbyte doctor`: versions, machine, and which kernel runs each operation and why.

It owns what is asked and its table; it must not know how kernels are chosen.
"""

from __future__ import annotations

import platform
from typing import Any

from halfbyte import __version__
from halfbyte.cli.consoles import STDOUT, print_json, size
from halfbyte.cli.recipe import Json

EXAMPLES = "[bold]Examples[/]\n\nhalfbyte doctor\n\nhalfbyte doctor --json"


def doctor(as_json: Json = False) -> None:
    """Print versions, the machine, and which kernel runs each operation and why."""
    facts = examine()
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def examine() -> dict[str, Any]:
    """Everything the doctor says, as JSON values."""
    import torch

    from halfbyte.govern.manifest import Hardware, versions
    from halfbyte.kernels import backends, native
    from halfbyte.model.blocks import FAMILIES
    from halfbyte.model.precision import computing_dtype

    module = native.module()
    return {
        "versions": {"halfbyte": __version__, "python": platform.python_version(), **versions()},
        "hardware": vars(Hardware.here()),
        "threads": torch.get_num_threads(),
        "auto_dtype": str(computing_dtype("auto")).removeprefix("torch."),
        "native_kernels": module is not None,
        "notice": native.notice(),
        "instruction_sets": dict(module.instruction_sets()) if module is not None else {},
        "fused_layers": [name.rpartition(".")[2] for name in FAMILIES],
        "kernels": [choice._asdict() for choice in backends.describe()],
        "cache": _cache(),
    }


def _cache() -> dict[str, Any]:
    """Where tokenised rows are kept, and how much of them."""
    from halfbyte.data.cache import cache_folder, kept_in

    kept = kept_in(cache_folder())
    return {"folder": str(cache_folder()), "kept": len(kept), "bytes": sum(each.nbytes for each in kept)}


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table

    hardware = facts["hardware"]
    lines = {
        "versions": ", ".join(f"{name} {version or 'absent'}" for name, version in facts["versions"].items()),
        "system": hardware["system"],
        "processor": f"{hardware['processor']}, {hardware['cores']} cores",
        "memory": size(hardware["memory_bytes"]),
        "threads": str(facts["threads"]),
        "dtype: auto": facts["auto_dtype"],
        "instructions": ", ".join(f"{name} ({state})" for name, state in facts["instruction_sets"].items())
        or "no native kernels",
        "fused layers": f"{', '.join(facts['fused_layers'])}; other types run as they are",
    }
    cache = facts["cache"]
    lines["tokenised rows"] = f"{cache['kept']} kept in {cache['folder']}, {size(cache['bytes'])}"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, text in lines.items():
        table.add_row(name, text)
    STDOUT.print(table, highlight=False)
    kernels = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("operation", "dtypes", "runs on", "why"):
        kernels.add_column(heading)
    for (operation, backend, why), dtypes in _grouped(facts["kernels"]).items():
        kernels.add_row(operation, ", ".join(dtypes), backend, why)
    STDOUT.print()
    STDOUT.print(kernels, highlight=False)


def _grouped(kernels: list[dict[str, str]]) -> dict[tuple[str, str, str], list[str]]:
    """Dtypes that are served alike, by operation."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for choice in kernels:
        groups.setdefault((choice["operation"], choice["backend"], choice["why"]), []).append(choice["dtype"])
    return groups
