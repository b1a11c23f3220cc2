"""What runs on which hardware: this machine as it is found, or one named in a table with sources.

It owns the table and what is asked of the system; it must not know models or forecasts.
"""

from __future__ import annotations

import difflib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.errors import PlanError
from halfbyte.plan.cost import estimate_of
from halfbyte.plan.prices import MACHINES, Row
from halfbyte.plan.terms import Estimate
from halfbyte.plan.time import Speeds
from halfbyte.system import available_bytes, processor_name

_NO_PRICE = Estimate.unknown("USD/h", "nobody rents it out under this name")


@dataclass(frozen=True)
class Hardware:
    """A machine that a run may take place on.

    Attributes:
        name: As it is called.
        memory_bytes: Memory that the run may take; of a card its own.
        disk_bytes: Free disk; None where that is not known.
        speeds: Of a table's machine, from its data sheet; None for this machine, which is measured.
        power_watts: At full load; None where not known.
        price: Of an hour.
        source: Where the numbers were published.
        date: Of when.
    """

    name: str
    memory_bytes: int
    disk_bytes: int | None
    speeds: Speeds | None
    power_watts: float | None
    price: Estimate
    source: str
    date: str

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return self.speeds is None


def _card(name: str, sizes: tuple[float, float, float, float], price: Row | None, source: str) -> Hardware:
    """A card of a table: GB, TFLOPS of dense bfloat16 products, GB/s, watts."""
    memory_gb, tflops, bandwidth, watts = sizes
    priced = _NO_PRICE if price is None else estimate_of(price)._replace(unit=f"{price.unit}/h")
    speeds = Speeds(tflops * 1e12, bandwidth * 1e9, None, None, None)
    return Hardware(name, int(memory_gb * 1e9), None, speeds, watts, priced, source, "2026")


NAMED: dict[str, Hardware] = {
    each.name: each
    for each in (
        _card(
            "h100",
            (80, 989, 3350, 700),
            MACHINES["h100"],
            "NVIDIA H100 SXM data sheet, without sparsity",
        ),
        _card("a100-80gb", (80, 312, 2039, 400), MACHINES["a100-80"], "NVIDIA A100 80GB SXM data sheet"),
        _card("l4", (24, 121, 300, 72), MACHINES["g6.xlarge"], "NVIDIA L4 data sheet, without sparsity"),
        _card("rtx-4090", (24, 165.2, 1008, 450), None, "NVIDIA Ada architecture paper: sums in float32"),
        _card("rtx-3090", (24, 71, 936, 350), None, "NVIDIA GA102 architecture paper: sums in float32"),
    )
}
"""Cards by the names that `--hardware` takes."""


def find_hardware(folder: Path) -> Hardware:
    """This machine, as it is now.

    Args:
        folder: On the disk that will be written to.
    """
    return Hardware(
        name=f"{processor_name()}, {torch.get_num_threads()} threads",
        memory_bytes=available_bytes(),
        disk_bytes=shutil.disk_usage(_existing(folder)).free,
        speeds=None,
        power_watts=None,
        price=Estimate.unknown("USD/h", "it is yours"),
        source="found",
        date="",
    )


def named_hardware(name: str) -> Hardware:
    """A machine of the table.

    Raises:
        PlanError: HB702 for one that is not in it.
    """
    if name in NAMED:
        return NAMED[name]
    near = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.4)
    known = ", ".join(NAMED)
    fix = f"use {near[0]}, or one of {known}" if near else f"use one of {known}"
    raise PlanError("HB702", f"no figures of {name!r} are known", where="--hardware", fix=fix)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
