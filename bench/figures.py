"""What every benchmark shares: a figure and its floor, how figures are kept, and the timing of two sides.

It owns the form of the results (JSON lines on stdout, rows of bench/results/<bench>.csv); it must not know
what is measured.

A benchmark is a generator of figures:

    def measure(quick: bool) -> Iterator[Figure]:
        seconds = time_sides({"ours": ours, "theirs": theirs})
        yield Figure.at_least("4-bit product, speed-up", seconds["theirs"] / seconds["ours"], "x", 1.5)

    if __name__ == "__main__":
        sys.exit(run("kernels", measure))
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8"),
    *("amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Figure:
    """One measured number, what it shows, and the least that it must be.

    Args:
        claim: What the number says, in words that stand alone.
        figure: The number; None where it could not be measured (printed as null, kept as "unknown").
        unit: Its unit, "" for a bare count.
        floor: The promise as text, ">= 1.5" or "<= 0.01"; "" where nothing is promised.
        ok: Whether the promise is kept; a NaN or an unknown never keeps one.
    """

    claim: str
    figure: float | None
    unit: str
    floor: str = ""
    ok: bool = True

    @classmethod
    def at_least(cls, claim: str, figure: float | None, unit: str, floor: float) -> Figure:
        """A figure that must reach `floor`."""
        return cls(claim, figure, unit, f">= {floor:g}", figure is not None and figure >= floor)

    @classmethod
    def at_most(cls, claim: str, figure: float | None, unit: str, floor: float) -> Figure:
        """A figure that must not pass `floor`."""
        return cls(claim, figure, unit, f"<= {floor:g}", figure is not None and figure <= floor)


def run(name: str, measure: Callable[[bool], Iterable[Figure]], argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark: prints each figure as it comes, keeps it, and judges.

    Args:
        name: The benchmark's name, also its results file's.
        measure: Yields the figures; its argument says whether to answer within a minute.
        argv: Command line; None takes the process's own.

    Returns:
        Exit status: 0 where every floor is kept, 1 where one is missed or nothing was measured.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument(
        "--quick", action="store_true", help="answer within a minute, with less behind the figures"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(argv)
    facts = {"machine": machine(), "versions": versions(), "revision": revision()}
    print(json.dumps({"bench": name, "quick": options.quick, **facts}), file=sys.stderr, flush=True)
    count, missed = 0, 0
    for figure in measure(options.quick):
        print(json.dumps(asdict(figure), allow_nan=True), flush=True)
        _keep(options.results / f"{name}.csv", figure, {"quick": options.quick, **facts})
        count, missed = count + 1, missed + (not figure.ok)
    print(f"{name}: {count} figures, {missed} below their floor", file=sys.stderr)
    return 0 if count and not missed else 1


def _keep(path: Path, figure: Figure, facts: Mapping[str, object]) -> None:
    row: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **asdict(figure),
        **facts,
    }
    if figure.figure is None:
        row["figure"] = "unknown"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def time_sides(
    sides: Mapping[str, Callable[[], object]], *, rounds: int = 7, warmup: int = 1, calls: int = 1
) -> dict[str, float]:
    """Times several ways of doing the same thing, in turn, so that a busy machine is equally unkind to each.

    Args:
        sides: Name to call without arguments.
        rounds: How often each side is timed.
        warmup: Untimed rounds before.
        calls: Calls per timing, for what is too short for the clock.

    Returns:
        Median seconds per call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warmup + rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            if round_number >= warmup:
                seconds[name].append((time.perf_counter() - begin) / calls)
    return {name: statistics.median(each) for name, each in seconds.items()}


def shared(relative: str) -> Path:
    """Path of the shared real models and data; a missing one ends the benchmark with what to set."""
    path = Path(os.environ.get("HALFBYTE_SHARED", ROOT.parent / "shared")) / relative
    if not path.exists():
        sys.exit(f"{path} is missing; set HALFBYTE_SHARED to the folder that holds {relative}")
    return path


def machine() -> str:
    """CPU model, usable cores and the instruction sets that matter here, and the GPU if torch sees one."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    elif sys.platform == "darwin":
        model = _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [model, f"{cores} cores", " ".join(name for name in INSTRUCTION_SETS if name in flags)]
    torch = sys.modules.get("torch")
    if torch is not None:
        parts.append(f"{torch.get_num_threads()} torch threads")
        if torch.cuda.is_available():
            parts.append(torch.cuda.get_device_name())
    return "; ".join(part for part in parts if part)


def versions() -> str:
    """Python and the packages whose speed or numbers can move a figure."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def revision() -> str:
    """The commit measured, with "+" where the working tree's source differs from it."""
    commit = _output(["git", "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "status", "--porcelain", "--", "src", "native"])
    return f"{commit}{'+' if changed else ''}" if commit else "unknown"


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
