"""What a run was made from: files with digests, seed, versions, hardware, kernels.

It owns manifest.json; it must not import torch and knows nothing of the run's results.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.system import processor_name

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
BASE_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Hardware:
    """The machine, as far as it tells.

    Attributes:
        system: Operating system and its release.
        processor: The CPU's own name.
        cores: Logical cores this process may use.
        memory_bytes: Memory of the machine; None where the system does not say.
    """

    system: str
    processor: str
    cores: int
    memory_bytes: int | None

    @classmethod
    def here(cls) -> Hardware:
        """This machine."""
        return cls(f"{platform.system()} {platform.release()}", processor_name(), _cores(), _memory_bytes())


def manifest(
    halfbyte_version: str, seed: int, base: Path, data: Sequence[Path], facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decided a run, as JSON values.

    Args:
        halfbyte_version: Of this package.
        seed: The run's seed.
        base: Folder of the base model.
        data: Files of rows.
        facts: What only the caller knows: template, dtype, kernels that run.

    Returns:
        Versions, hardware, and path, size and SHA-256 of each file.
    """
    return {
        "created": datetime.now(UTC).isoformat(),
        "seed": seed,
        "versions": {"halfbyte": halfbyte_version, "python": platform.python_version(), **versions()},
        "hardware": vars(Hardware.here()),
        "base": digests(sorted({file for pattern in BASE_FILES for file in base.glob(pattern)})),
        "data": digests(data),
        **facts,
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package, read without importing it; None where it is absent."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def digests(files: Iterable[Path]) -> list[dict[str, str | int]]:
    """Path, size in bytes and SHA-256 of each file."""
    return [{"path": str(f), "bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
