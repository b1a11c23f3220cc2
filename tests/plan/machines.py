"""A machine's files under a folder of a test's own: energy counters, memory, disks."""

from __future__ import annotations

from pathlib import Path

MILLION = 1_000_000
RANGE_UJ = 262_143 * MILLION


class Zone:
    """One RAPL domain.

    Args:
        root: Where `sys` is.
        name: Folder of the domain, such as `intel-rapl:0:1`.
        domain: What it counts.
        energy_uj: The counter.
    """

    def __init__(self, root: Path, name: str, domain: str, energy_uj: int = 5 * MILLION) -> None:
        self.folder = root / "sys/class/powercap" / name
        self.folder.mkdir(parents=True)
        (self.folder / "name").write_text(domain + "\n", encoding="ascii")
        (self.folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n", encoding="ascii")
        self.set(energy_uj)

    def set(self, energy_uj: int) -> None:
        (self.folder / "energy_uj").write_text(f"{energy_uj}\n", encoding="ascii")


def write_status(root: Path, *, hwm: int | None, rss: int, anon: int, file: int, shmem: int = 0) -> None:
    """`/proc/self/status`, sizes in MiB."""
    sizes = {"VmHWM": hwm, "VmRSS": rss, "RssAnon": anon, "RssFile": file, "RssShmem": shmem}
    lines = [f"{name}:\t{size * 1024:8d} kB" for name, size in sizes.items() if size is not None]
    path = root / "proc/self/status"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Name:\tpython\n" + "\n".join(lines) + "\nThreads:\t1\n", encoding="ascii")
