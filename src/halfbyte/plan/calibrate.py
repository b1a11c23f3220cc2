"""What this machine can do, measured once and kept: what a process takes, how fast it is, how long passes take.

It owns the measures and where they are kept; it must not know how they are made or what is forecast from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from halfbyte.data.cache import cache_folder, key_of
from halfbyte.kernels import native
from halfbyte.plan.loaded import open_for_plan
from halfbyte.plan.measure import measure_passes, measure_speeds
from halfbyte.plan.memory import Runtime
from halfbyte.plan.probe import measure_runtime
from halfbyte.plan.time import Speeds, Timing
from halfbyte.plan.work import Sizes, Work
from halfbyte.system import processor_name
from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte.settings import Config

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """What was measured of a machine.

    Attributes:
        machine: Its processor and threads, and the versions measured.
        date: Day of the measurement.
        speeds: How fast it is.
        runtimes: What a process takes beside its model, by tokenizer.
        passes: What passes took, by shape.
    """

    machine: str
    date: str
    speeds: Speeds
    runtimes: Mapping[str, Runtime] = field(default_factory=dict)
    passes: Mapping[str, Timing] = field(default_factory=dict)

    def runtime(self, config: Config) -> Runtime:
        """What a process takes that uses a model's tokenizer."""
        return self.runtimes[tokenizer_key(config)]

    def on(self, machine: str, speeds: Speeds, date: str) -> Calibration:
        """What is known of another machine: its speeds, and what a process takes, which is the same there."""
        return replace(self, machine=machine, date=date, speeds=speeds, passes={})

    def timing(self, config: Config, work: Work) -> Timing | None:
        """What passes of a shape took; None where none was timed."""
        return self.passes.get(shape_key(config, work))


def calibrate(config: Config, work: Work, sizes: Sizes, *, again: bool = False) -> Calibration:
    """The measures that a forecast of a run needs; what is not known yet is measured and kept.

    Args:
        config: Settings of the run.
        work: What it has to do.
        sizes: Of its model.
        again: Measure all anew.

    Raises:
        PlanError: HB701 where a tiny training fails.
    """
    file = calibration_file()
    known = None if again else read_calibration(file)
    if known is None:
        today = datetime.now(UTC).date().isoformat()
        known = Calibration(machine_name(), today, measure_speeds(file.parent))
    tokenizer, shape = tokenizer_key(config), shape_key(config, work)
    if tokenizer not in known.runtimes:
        found = measure_runtime(open_for_plan(config.model).path)
        known = replace(known, runtimes={**known.runtimes, tokenizer: found})
    if shape not in known.passes:
        timing = measure_passes(config, sizes, work, known.speeds)
        known = replace(known, passes={**known.passes, shape: timing})
    write_calibration(file, known)
    return known


def calibration_file() -> Path:
    """Where the measures are kept: beside the cache of rows."""
    return cache_folder().parent / FILE


def machine_name() -> str:
    """What tells one machine, and one installation on it, from another."""
    compiled = native.module()
    facts = (
        processor_name(),
        f"{torch.get_num_threads()} threads",
        compiled.active() if compiled is not None else "reference kernels",
        f"halfbyte {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    )
    return "; ".join(facts)


def tokenizer_key(config: Config) -> str:
    """Tells tokenizers apart by their file."""
    file = open_for_plan(config.model).path / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "none"


def shape_key(config: Config, work: Work) -> str:
    """Tells passes apart whose times differ: by the layers' shape, the adapter and the tokens."""
    ignored = ("num_hidden_layers", "layer_types", "_name_or_path", "architectures", "transformers_version")
    settings = {k: v for k, v in open_for_plan(config.model).config.items() if k not in ignored}
    facts = {
        "model": settings,
        "method": config.method,
        "dtype": config.dtype,
        "quantization": config.quantization.model_dump(),
        "lora": config.lora.model_dump(),
        "tokens": round(work.tokens_per_pass),
        "row_tokens": round(work.row_tokens),
    }
    return key_of(facts)[:16]


def read_calibration(file: Path) -> Calibration | None:
    """What is kept of this very machine and installation; None where there is nothing, or nothing whole."""
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["machine"] != machine_name():
            return None
        return Calibration(
            kept["machine"],
            kept["date"],
            Speeds(**kept["speeds"]),
            {key: Runtime(**value) for key, value in kept["runtimes"].items()},
            {key: Timing(**value) for key, value in kept["passes"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_calibration(file: Path, calibration: Calibration) -> None:
    """Keep the measures, whole or not at all."""
    content = asdict(calibration) | {
        "speeds": calibration.speeds._asdict(),
        "runtimes": {key: value._asdict() for key, value in calibration.runtimes.items()},
        "passes": {key: value._asdict() for key, value in calibration.passes.items()},
    }
    unfinished = file.with_suffix(f".{os.getpid()}")
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(file)
