"""The machine's own energy counters: RAPL of the processor, NVML of NVIDIA GPUs.

It owns how they are read, what they leave out and why one is not there; it must not know runs, prices or estimates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

POWERCAP = "sys/class/powercap"
GPUS = "proc/driver/nvidia/gpus"
MICROJOULES = 1_000_000
MILLIJOULES = 1_000


class Counter(Protocol):
    """Energy since it was opened.

    Attributes:
        joules: So far; None where there is no counter, or it stopped being one.
        told: What is counted, or why nothing is.
    """

    joules: float | None
    told: str

    def advance(self) -> None:
        """Read the counter; at least once a minute, so that it wraps round at most once in between."""


class Absent:
    """A counter that this machine does not have.

    Args:
        why: The reason.
    """

    def __init__(self, why: str) -> None:
        self.joules: float | None = None
        self.told = why

    def advance(self) -> None:
        """There is nothing to read."""


class _Domain:
    """One counter file of RAPL."""

    def __init__(self, zone: Path, name: str) -> None:
        self.zone, self.name = zone, name
        self.range_uj = int(_text(zone / "max_energy_range_uj"))
        if self.range_uj <= 0:
            raise ValueError(f"{name} wraps round at {self.range_uj}")
        self.last_uj = self._read()
        self.total_uj = 0

    def _read(self) -> int:
        return int(_text(self.zone / "energy_uj"))

    def advance(self) -> None:
        now = self._read()
        self.total_uj += (now - self.last_uj) % self.range_uj
        self.last_uj = now


class Rapl:
    """The processor's counters, each joule once: packages, and memory beside them.

    A package holds its cores and its graphics, so their domains are left out; `psys` holds the packages and is taken
    only where it is alone. Memory (`dram`) lies under its package in the tree but is not in its sum.

    Args:
        domains: The domains to add up.

    Source: the Linux kernel's powercap interface; Intel's Software Developer's Manual, volume 3B, "RAPL Interfaces".
    """

    def __init__(self, domains: list[_Domain]) -> None:
        self._domains = domains
        self.joules: float | None = 0.0
        self.told = ", ".join(domain.name for domain in domains)

    def advance(self) -> None:
        """Read every domain; one that does not move is none, as in a virtual machine."""
        if self.joules is None:
            return
        try:
            for domain in self._domains:
                domain.advance()
        except (OSError, ValueError) as fault:
            self.joules, self.told = None, f"RAPL could not be read any more: {fault}"
            return
        self.joules = sum(domain.total_uj for domain in self._domains) / MICROJOULES


def open_rapl(root: Path = Path("/")) -> Counter:
    """The processor's counters, or why there are none.

    Args:
        root: Where `sys` is.
    """
    zones = {zone: _name(zone) for zone in sorted((root / POWERCAP).glob("intel-rapl:*"))}
    chosen = _each_joule_once(zones)
    if not chosen:
        return Absent("this system offers no RAPL counter")
    try:
        return Rapl([_Domain(zone, zones[zone]) for zone in chosen])
    except PermissionError:
        return Absent("RAPL counters may be read by root alone (since CVE-2020-8694)")
    except (OSError, ValueError) as fault:
        return Absent(f"RAPL counters cannot be read: {fault}")


def _each_joule_once(zones: dict[Path, str]) -> list[Path]:
    packages = [zone for zone, name in zones.items() if name.startswith("package")]
    memory = [zone for zone, name in zones.items() if name == "dram"]
    return packages + memory if packages else [zone for zone, name in zones.items() if name == "psys"]


class Nvml:
    """The counters of the NVIDIA GPUs that this process computes on; they exist since Volta.

    Args:
        nvml: The module `pynvml`, initialised.

    Source: NVML API reference, `nvmlDeviceGetTotalEnergyConsumption`.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        self._handles = {_plain(nvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
        self._first_mj = {uuid: self._read(handle) for uuid, handle in self._handles.items()}
        self.joules: float | None = 0.0
        self.told = "no GPU is in use"

    def _read(self, handle: Any) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except self._nvml.NVMLError:
            return None

    def advance(self) -> None:
        """Read the GPUs in use."""
        self.count(gpus_in_use())

    def count(self, uuids: Iterable[str]) -> None:
        """Read these GPUs."""
        total = 0
        used = list(map(_plain, uuids))
        for uuid in used:
            handle, first = self._handles.get(uuid), self._first_mj.get(uuid)
            now = self._read(handle) if handle is not None else None
            if first is None or now is None:
                self.joules, self.told = None, f"GPU {uuid} has no energy counter"
                return
            total += now - first
        if used:
            self.joules, self.told = total / MILLIJOULES, f"{len(used)} GPU(s) by NVML"


class _Uncounted(Absent):
    """A GPU is there and NVML is not: nothing is missing until the GPU is used."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self._why = why
        self.joules, self.told = 0.0, "no GPU is in use"

    def advance(self) -> None:
        """Say that energy is missing once a GPU is in use."""
        if gpus_in_use():
            self.joules, self.told = None, self._why


def open_nvml(root: Path = Path("/")) -> Counter:
    """The GPUs' counters; without a GPU one that has counted nothing.

    Args:
        root: Where `proc` is.
    """
    if not any((root / GPUS).glob("*")):
        counter = Absent("there is no NVIDIA GPU")
        counter.joules = 0.0
        return counter
    try:
        import pynvml
    except ImportError:
        return _Uncounted("a GPU's energy needs nvidia-ml-py: pip install 'halfbyte[energy]'")
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml)
    except pynvml.NVMLError as fault:
        return _Uncounted(f"NVML does not answer: {fault}")


def gpus_in_use() -> list[str]:
    """UUIDs of the GPUs on which this process has taken memory through torch."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    devices = range(torch.cuda.device_count())
    return [
        str(torch.cuda.get_device_properties(i).uuid) for i in devices if torch.cuda.max_memory_reserved(i)
    ]


def _plain(uuid: str | bytes) -> str:
    """A GPU's UUID without NVML's prefix, as torch has it."""
    text = uuid.decode() if isinstance(uuid, bytes) else uuid
    return text.removeprefix("GPU-").lower()


def _name(zone: Path) -> str:
    try:
        return _text(zone / "name")
    except OSError:
        return ""


def _text(file: Path) -> str:
    return file.read_text(encoding="ascii").strip()
