"""A whole training step beside the peers': transformers with bitsandbytes' NF4 and PEFT, and TRL, on the same CPU.

It owns what is compared and how the sides take turns; it must not know how a side works (bench/sides).

    python bench/step_vs_peers.py [--quick] [--scenario NAME] [--layers N] [--tokens N] [--rounds N] [--threads N]

The model has TinyLlama-1.1B's shape with 8 or 22 layers and random weights, made once; LoRA of rank 16 beside all
linear layers. Each side is a process of its own, the peers' in an environment with the versions of bench/peers.txt,
made once under build/. The sides take turns step by step, and each sleeps in the others' turns, which is checked.

`checkpointing` and `plain`: one row, the same for all, every token trained, beside the shortest PEFT loop with and
without gradient checkpointing. `trl` and `packing`: instruction rows (alpaca_en_demo.json), 8 at a time, beside TRL's
SFTTrainer as it is and with `packing=True`; useful tokens are those that are no filling. Whether TRL's packed rows
see one another is measured too. Peak memory is the largest resident set after loading.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from figures import ROOT, Figure, run, shared
from peers import PEERS, peers_python

SIDES = ROOT / "bench" / "sides"

LAYERS, TOKENS = (8, 22), (512, 2048)
LEAN_FLOOR, FREE_FLOOR, PLAIN_FLOOR = 1.35, 1.7, 1.25
"""Against checkpointing in no more memory than it has; with memory up to what PEFT has without it; against that."""
TRL_FLOOR, PACKING_FLOOR = 4.0, 1.7
TRL_LAYERS, TRL_BATCH = 4, 8
PACKED_BATCH = 1
"""Packed rows of 1,024 tokens that TRL takes at once: about as many tokens as 8 rows have, so about the same step."""

LIMITS = {
    "avx2": {
        "HALFBYTE_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "portable": {
        "HALFBYTE_ISA": "portable",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
"""What limits halfbyte, torch's own kernels and its matrix libraries to an instruction set."""
LIMITED_FLOORS = {"avx2": 1.0, "portable": None}
"""Of the speed against every peer, limited alike; portable code, for machines of before 2013, promises nothing."""

LORA = {"r": 16, "alpha": 32, "learning_rate": 2e-4, "seed": 0}
SAME_LOSS = 2.0**-5
"""Most that first losses may differ, in nats: the same 4-bit weights, logits of up to 4, rounded to 2^-8."""
IDLE = 0.02
"""Most processor time that a side may use per second of another side's turn."""


@dataclass(frozen=True)
class Scope:
    """What part of the benchmark runs.

    Args:
        scenarios: Of checkpointing, plain, trl, packing.
        layers: Of the models of the first two.
        tokens: Of their row.
        trl_layers: Of the model of the last two.
        rounds: Timed turns of each side.
        warmup: Untimed turns before.
        threads: Of each side.
        isa: Instruction set that every side is limited to; None for none.
        longest: Tokens of the longest instruction row taken; None takes all.
        has_floors: Whether the figures promise something; a small model's do not.
    """

    scenarios: tuple[str, ...] = ("checkpointing", "plain", "trl", "packing")
    layers: tuple[int, ...] = LAYERS
    tokens: tuple[int, ...] = TOKENS
    trl_layers: int = TRL_LAYERS
    rounds: int = 7
    warmup: int = 2
    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    isa: str | None = None
    longest: int | None = None
    has_floors: bool = True

    def floor(self, whole: float) -> float | None:
        """What is promised where `whole` is with all instructions and a model of full width."""
        if not self.has_floors:
            return None
        return whole if self.isa is None else LIMITED_FLOORS[self.isa]

    @property
    def machine(self) -> dict[str, Any]:
        """What a side runs on: its threads, instruction set and the numbers that it computes in.

        Limited to fewer instructions every side computes in float32: there the peers' products of bfloat16 take
        many times as long, so that float32 is what is fastest for them.
        """
        return {
            "threads": self.threads,
            "isa": self.isa,
            "dtype": "bfloat16" if self.isa is None else "float32",
        }


QUICK = {
    "layers": (1,),
    "tokens": (64,),
    "trl_layers": 1,
    "rounds": 1,
    "warmup": 1,
    "longest": 60,
    "has_floors": False,
}


class Side:
    """A process that does steps when told to; see bench/sides/protocol.py.

    Args:
        name: Of the side, in claims.
        python: Interpreter of its environment.
        script: File in bench/sides.
        options: What it is told first.
    """

    def __init__(self, name: str, python: Path, script: str, options: Mapping[str, Any]) -> None:
        self.name = name
        threads = str(options["threads"])
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        own = {"OMP_NUM_THREADS": threads, "HF_HOME": str(PEERS / "hf")}
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, closed with the side
        self._process = subprocess.Popen(
            [python, SIDES / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | quiet | LIMITS.get(options["isa"], {}) | own,
        )
        self.steps: list[dict[str, float]] = []
        self.idle_s = self.others_s = 0.0
        self.first_loss = 0.0
        self.peak_bytes = 0
        self.facts = self.ask(**options)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Tell it something and wait for the answer; a side that died ends the benchmark with its last words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._log.seek(0)
            sys.exit(f"{self.name} ended:\n{self._log.read()[-4000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def processor_s(self) -> float:
        """Processor time used so far; 0 where the system does not say."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return 0.0
        used = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
        return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    @property
    def seconds(self) -> float:
        """Median of a step."""
        return statistics.median(step["seconds"] for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Useful tokens of all steps by their time."""
        return sum(s["tokens"] for s in self.steps) / sum(s["seconds"] for s in self.steps)


def take_turns(sides: Sequence[Side], scope: Scope) -> None:
    """Let each side do its steps, one at a time, in an order that turns round; note what idle sides use."""
    for number in range(scope.warmup + scope.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            before = {other: other.processor_s() for other in sides if other is not side}
            steps = side.ask(do="step", steps=1)["steps"]
            for other, used in before.items():
                other.idle_s += other.processor_s() - used
                other.others_s += steps[0]["seconds"]
            side.first_loss = steps[0]["loss"] if number == 0 else side.first_loss
            if number >= scope.warmup:
                side.steps += steps


def measure(scope: Scope, quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    if quick:
        scope = Scope(**{**vars(scope), **QUICK})
    python = peers_python()
    direct = tuple(name for name in ("checkpointing", "plain") if name in scope.scenarios)
    for layers in scope.layers if direct else ():
        for tokens in scope.tokens:
            yield from one_row(direct, layers, tokens, scope, python)
    if {"trl", "packing"} & set(scope.scenarios):
        yield from instructions(scope, python)


def one_row(
    scenarios: tuple[str, ...], layers: int, tokens: int, scope: Scope, python: Path
) -> Iterator[Figure]:
    """Steps of one row of tokens that are all trained, beside PEFT's."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        ids = [3 + (7919 * i * i + 104729 * i) % 31_000 for i in range(tokens)]
        rows.write_text(json.dumps([{"input_ids": ids, "trained": [True] * tokens}]), encoding="utf-8")
        options = {"model": str(model_folder(layers)), "rows": str(rows), **scope.machine, **LORA}
        own = {**options, "batch_size": 1}
        ours = [
            Side("halfbyte keeping all", Path(sys.executable), "halfbyte_side.py", own),
            Side(
                "halfbyte computing again", Path(sys.executable), "halfbyte_side.py", {**own, "recompute": 1}
            ),
        ]
        peers = {
            name: Side(
                f"PEFT {name}", python, "peft_side.py", {**options, "checkpointing": name == "checkpointing"}
            )
            for name in scenarios
        }
        take_turns([*ours, *peers.values()], scope)
        where = f"step of {tokens} tokens, {layers} layers, {scope.threads} threads"
        where += f", all limited to {scope.isa} and in float32" if scope.isa else ""
        yield from common(where, [*ours, *peers.values()])
        yield from compared(where, ours, peers, scope)


def compared(where: str, ours: Sequence[Side], peers: Mapping[str, Side], scope: Scope) -> Iterator[Figure]:
    """Speed against each peer: of our fastest side that takes no more memory, and of the one that keeps all."""
    for name, theirs in peers.items():
        allowed = [side for side in ours if side.peak_bytes <= theirs.peak_bytes]
        fastest = min(allowed, key=lambda side: side.seconds, default=None)
        ratio = None if fastest is None else theirs.seconds / fastest.seconds
        floor = LEAN_FLOOR if name == "checkpointing" else PLAIN_FLOOR
        claim = f"{where}: speed against {theirs.name}, in no more memory"
        yield promised(claim, ratio, "x", scope.floor(floor))
        if name == "checkpointing":
            claim = f"{where}: speed against {theirs.name}, keeping all"
            ratio = theirs.seconds / ours[0].seconds
            yield promised(claim, ratio, "x", scope.floor(FREE_FLOOR))
        off = abs(ours[0].first_loss - theirs.first_loss)
        yield Figure.at_most(f"{where}: first loss, off {theirs.name}'s", off, "nats", SAME_LOSS)


def instructions(scope: Scope, python: Path) -> Iterator[Figure]:
    """Steps of instruction rows, beside TRL's."""
    layers = scope.trl_layers
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(instruction_rows(layers, scope.longest)), encoding="utf-8")
        options = {"model": str(model_folder(layers)), "rows": str(rows), **scope.machine, **LORA}
        options["batch_size"] = TRL_BATCH
        for name, floor in (("trl", TRL_FLOOR), ("packing", PACKING_FLOOR)):
            if name not in scope.scenarios:
                continue
            packed = {
                "packing": name == "packing",
                **({"batch_size": PACKED_BATCH} if name == "packing" else {}),
            }
            sides = [
                Side("halfbyte", Path(sys.executable), "halfbyte_side.py", options),
                Side(
                    "TRL, packing" if name == "packing" else "TRL",
                    python,
                    "trl_side.py",
                    {**options, **packed},
                ),
            ]
            take_turns(sides, scope)
            where = f"instruction rows, {layers} layers, {scope.threads} threads, {name}"
            yield from common(where, sides)
            ours, theirs = sides
            leak = theirs.facts.get("leak")
            if name == "packing":
                yield Figure(
                    f"{where}: logits of a row move by, when the row packed before it is another", leak, ""
                )
            note = " (whose packed rows see one another)" if leak else ""
            claim = f"{where}: useful tokens per second against {theirs.name}{note}"
            ratio = ours.tokens_per_s / theirs.tokens_per_s
            yield promised(claim, ratio, "x", scope.floor(floor))


def promised(claim: str, figure: float | None, unit: str, floor: float | None) -> Figure:
    return Figure(claim, figure, unit) if floor is None else Figure.at_least(claim, figure, unit, floor)


def common(where: str, sides: Sequence[Side]) -> Iterator[Figure]:
    """Time, tokens, memory and idleness of each side; the sides end."""
    for side in sides:
        memory = side.ask(do="memory")
        side.peak_bytes = memory["VmHWM"]
        side.close()
        yield Figure(f"{where}: {side.name}, time of a step", side.seconds, "s")
        yield Figure(f"{where}: {side.name}, useful tokens", side.tokens_per_s, "tokens/s")
        peak = memory["VmHWM"] if side.facts["peak_since_ready"] else None
        yield Figure(f"{where}: {side.name}, peak memory", mib(peak), "MiB")
        of_files = None if peak is None or memory["RssFile"] is None else peak - memory["RssFile"]
        yield Figure(f"{where}: {side.name}, peak memory less mapped files", mib(of_files), "MiB")
        idle = side.idle_s / side.others_s
        yield Figure.at_most(f"{where}: {side.name}, processor used in others' turns", idle, "s/s", IDLE)


def mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def model_folder(layers: int) -> Path:
    """TinyLlama-1.1B's shape with random weights and a real tokenizer, made once per number of layers."""
    folder = random_llama(
        f"tinyllama-{layers}",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32_000,
        max_position_embeddings=2048,
    )
    for file in shared("models/llama2-tokenizer").iterdir():
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return folder


def random_llama(name: str, **sizes: int) -> Path:
    """A Llama of these sizes with random weights in bfloat16, made once under its name."""
    folder = PEERS / name
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial_folder = folder.with_suffix(".partial")
    model.save_pretrained(partial_folder)
    partial_folder.rename(folder)
    return folder


def instruction_rows(layers: int, longest: int | None) -> list[dict[str, Any]]:
    """The rows as token ids with a mask of those to learn, so that both sides train on the same."""
    from halfbyte.config import load_config
    from halfbyte.tasks.known import prepare

    data = {
        "train": str(shared("datasets/alpaca/alpaca_en_demo.json")),
        "eval_fraction": 0.0,
        "max_length": 1024,
    }
    found = prepare(load_config(None, base={"model": str(model_folder(layers)), "data": data}))
    return [
        {"input_ids": row.input_ids.tolist(), "trained": row.trained.tolist()}
        for row in found.rows.train
        if longest is None or len(row.input_ids) <= longest
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="A whole training step beside the peers'.",
        epilog="--quick and --results: as all benchmarks.",
    )
    scope = Scope()
    parser.add_argument("--scenario", choices=scope.scenarios, action="append", help="these alone")
    parser.add_argument("--layers", type=int, action="append", help="of the model, these alone")
    parser.add_argument("--tokens", type=int, action="append", help="of a row, these alone")
    parser.add_argument("--rounds", type=int, default=scope.rounds, help="timed steps of each side")
    parser.add_argument("--isa", choices=LIMITS, help="limit every side to this instruction set")
    parser.add_argument("--threads", type=int, default=scope.threads, help="of each side")
    options, rest = parser.parse_known_args()
    scope = Scope(
        scenarios=tuple(options.scenario or scope.scenarios),
        layers=tuple(options.layers or LAYERS),
        tokens=tuple(options.tokens or TOKENS),
        trl_layers=options.layers[0] if options.layers else TRL_LAYERS,
        rounds=options.rounds,
        threads=options.threads,
        isa=options.isa,
    )
    return run("step_vs_peers", partial(measure, scope), rest)


if __name__ == "__main__":
    sys.exit(main())
