"""Does a forecast come true? Runs as processes of their own, each beside what was forecast of it.

It owns the runs and the two errors; it must not know how anything is forecast.

    python bench/forecast.py [--quick]

Every run is a whole `halfbyte train` of a few steps on a model with random weights and rows that fill their length.
Its peak memory is the process's own (VmHWM, nothing reset), its step time the median of all steps but the first. Two
of the runs are drawn when the benchmark starts, from a seed that it prints. Memory: each run within 3 % or 30 MB,
1.5 % on average; time: each within 15 %, 8 % on average.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from figures import Figure, run, shared
from halfbyte.config import load_config
from halfbyte.model.residency import Residency
from halfbyte.plan.calibrate import calibrate
from halfbyte.plan.expect import MEASURED_RUNTIME
from halfbyte.plan.forecast import Machine, dtype_of, forecast
from halfbyte.plan.terms import Forecast
from halfbyte.plan.work import Sizes, Work
from halfbyte.settings import Config
from halfbyte.system import available_bytes
from step_vs_peers import random_llama

STEPS = 8
ROWS = 24
MEMORY_SHARE, MEMORY_BYTES, MEMORY_MEAN = 0.03, 30e6, 0.015
TIME_SHARE, TIME_MEAN = 0.15, 0.08

SHAPES: dict[str, dict[str, int]] = {
    "11M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "110M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
    },
    "1.1B, 4 layers": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    },
    "3B, 6 layers": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 24,
    },
    "7B, 3 layers": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
    },
}
KV_HEADS = {"11M": 2, "1.1B": 4, "1.1B, 4 layers": 4, "3B, 6 layers": 8}


@dataclass(frozen=True)
class Run:
    """A run and its settings.

    Args:
        shape: Of the model.
        tokens: Of a row, and of a pass.
        rank: Of the adapter.
        settings: Further ones.
        quantised: Whether the base is written in 4 bits before, as streaming needs.
    """

    shape: str
    tokens: int
    rank: int
    settings: tuple[str, ...] = ()
    quantised: bool = False

    @property
    def name(self) -> str:
        """The run in words."""
        more = [*(["written in 4 bits"] if self.quantised else []), *self.settings]
        return ", ".join([self.shape, f"{self.tokens} tokens", f"r {self.rank}", *more])


KEPT = "train.activation_memory_gb={}"
RUNS = (
    Run("11M", 256, 16),
    Run("110M", 128, 8),
    Run("110M", 1024, 64, ("train.optimizer=lion",)),
    Run("110M", 512, 16, ("method=full",)),
    Run("1.1B, 4 layers", 512, 16),
    Run("1.1B, 4 layers", 2048, 16),
    Run("1.1B, 4 layers", 2048, 32, (KEPT.format(0.01),)),
    Run("1.1B, 4 layers", 1024, 64, (KEPT.format(0.15),)),
    Run("1.1B, 4 layers", 512, 16, ("method=lora",)),
    Run("1.1B", 256, 4),
    Run("1.1B", 512, 16, ("residency=streamed", KEPT.format(0.05)), quantised=True),
    Run("3B, 6 layers", 512, 16, (KEPT.format(0.1),)),
    Run("7B, 3 layers", 512, 64, ("train.optimizer=sgd",), quantised=True),
    Run("7B, 3 layers", 1024, 16, ("residency=streamed", KEPT.format(0.01)), quantised=True),
)
QUICK = (Run("11M", 256, 16), Run("110M", 128, 8), Run("110M", 512, 64, (KEPT.format(0.01),)))


def drawn(seed: int) -> tuple[Run, ...]:
    """Two runs that nobody chose."""
    random_of = random.Random(seed)
    found = []
    for _ in range(2):
        kept = random_of.choice([(), (KEPT.format(round(random_of.uniform(0.01, 0.3), 3)),)])
        shape = random_of.choice(["110M", "1.1B, 4 layers", "3B, 6 layers"])
        found.append(Run(shape, 8 * random_of.randint(16, 200), random_of.randint(4, 64), kept))
    return tuple(found)


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    seed = int(os.environ.get("HALFBYTE_SEED", time.time_ns() % 100_000))
    print(f"runs drawn by HALFBYTE_SEED={seed}", file=sys.stderr)
    memory, seconds = [], []
    for each in QUICK if quick else (*RUNS, *drawn(seed)):
        with tempfile.TemporaryDirectory() as name:
            config = settings_of(each, Path(name))
            expected = forecast_of(config, each)
            peak, step = carried_out(config, Path(name))
        off = expected.peak_bytes / peak - 1
        within = max(MEMORY_SHARE, MEMORY_BYTES / peak)
        memory.append(abs(off))
        yield Figure(f"{each.name}: peak memory", peak / 1e6, "MB")
        yield Figure.at_most(f"{each.name}: peak memory forecast, off", abs(off), "share", round(within, 4))
        print(f"  {off:+.2%} at {expected.phase}: {expected.memory}", file=sys.stderr)
        late = (expected.step_seconds.mid or 0.0) / step - 1
        seconds.append(abs(late))
        yield Figure(f"{each.name}: time of a step", step, "s")
        yield Figure.at_most(f"{each.name}: time of a step forecast, off", abs(late), "share", TIME_SHARE)
    yield Figure.at_most("peak memory forecast, off, mean", fmean(memory), "share", MEMORY_MEAN)
    yield Figure.at_most("time of a step forecast, off, mean", fmean(seconds), "share", TIME_MEAN)


def model_folder(shape: str, quantised: bool) -> Path:
    """A model of the shape with a real tokenizer, made once."""
    sizes = {
        **SHAPES[shape],
        "num_key_value_heads": KV_HEADS.get(shape, SHAPES[shape]["num_attention_heads"]),
    }
    name = "forecast-" + shape.replace(", ", "-").replace(" ", "-")
    folder = random_llama(name, **sizes, vocab_size=32_000, max_position_embeddings=4096)
    for file in shared("models/llama2-tokenizer").iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    in_4bit = folder.with_name(f"{name}-nf4")
    if quantised and not in_4bit.exists():
        command = [sys.executable, "-m", "halfbyte", "quantize", str(folder), str(in_4bit)]
        subprocess.run(command, check=True, capture_output=True)
    return in_4bit if quantised else folder


def settings_of(each: Run, folder: Path) -> Config:
    """The settings of a run, with its rows written."""
    random_of = random.Random(each.tokens)
    words = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "for",
        "with",
        "on",
        "as",
        "are",
        "be",
        "this",
        "have",
        "from",
        "or",
        "one",
        "had",
        "by",
        "but",
        "not",
        "what",
        "all",
    ]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(ROWS):
            stream.write(json.dumps({"text": " ".join(random_of.choices(words, k=2 * each.tokens))}) + "\n")
    base = {
        "model": str(model_folder(each.shape, each.quantised)),
        "output_dir": str(folder / "run"),
        "lora": {"r": each.rank, "alpha": 2 * each.rank},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "max_length": each.tokens,
            "max_truncated": 1.0,
            "eval_fraction": 0.0,
            "cache": False,
        },
        "train": {"max_steps": STEPS, "batch_size": 1, "batch_tokens": each.tokens},
    }
    return load_config(None, each.settings, base)


def forecast_of(config: Config, each: Run) -> Forecast:
    """What is forecast of a run."""
    work = Work.of([each.tokens] * ROWS, config)
    calibration = calibrate(config, work, Sizes.of(config.model, dtype_of(config)))
    runtime = calibration.runtime(config)
    machine = Machine(available_bytes() + runtime.training, runtime, MEASURED_RUNTIME, calibration)
    residency: Residency = "streamed" if config.residency == "streamed" else "resident"
    return forecast(config, work, machine, None if config.method == "full" else residency).forecast


_SCRIPT = """
import sys
from halfbyte.cli.app import call
try:
    call(sys.argv[1:])
finally:
    print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def carried_out(config: Config, folder: Path) -> tuple[int, float]:
    """The peak memory of the run's process, and its middle step without the first."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", _SCRIPT, "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (peak,) = [int(line.split()[1]) * 1024 for line in done.stderr.splitlines() if line.startswith("VmHWM")]
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][1:]
    return peak, median(record["tokens"] / record["tokens_per_s"] for record in records)


if __name__ == "__main__":
    sys.exit(run("forecast", measure))
