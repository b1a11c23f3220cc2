"""How fast weights and folders are quantised, beside bitsandbytes and the disk, and what the scale search saves.

It owns the settings measured; it must not know how anything is quantised.

    python bench/quantize.py [--quick]

Speed: one bfloat16 matrix of normal numbers, double quantization and packing included, both sides in turn on all
threads. Folder: `halfbyte quantize` of a sharded bfloat16 Llama that is not in the system's cache, against reading
the same files and writing as many bytes as come of it, one after the other, as fast as the disk does: past the
cache, with huge pages. The host of a virtual machine may hold the files in a cache of its own, for both sides alike:
the disk is then as fast as that. HALFBYTE_BENCH_DISK names a folder on the disk to measure. Error: the sum of
squared differences over every projection matrix of real models, the same bytes for both.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import halfbyte  # isort: skip  # noqa: F401, before torch: threads that wait for each other soon sleep
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from figures import Figure, run, shared, time_sides
from halfbyte.kernels import ops
from halfbyte.model.direct import PAGE, aligned_bytes, read_direct
from halfbyte.model.quantised_file import bytes_of
from halfbyte.model.quantising import prepare, quantise_folder
from halfbyte.quant.weight import QuantSpec, Scales

MODELS = ("all-MiniLM-L6-v2-fp16", "base-11m")
ABSMAX_FLOOR = 1000.0  # M weights/s on two cores
MSE_FLOOR = 80.0
DISK_FLOOR = 0.8  # of the disk's own speed
BLOCK = 1 << 24
SAVED_FLOOR = 12.0  # per cent of the squared error


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    yield from speed(2048 if quick else 8192, rounds=3 if quick else 7)
    yield from folder(layers=4 if quick else 48, rounds=2 if quick else 5)
    for model in MODELS:
        yield from error(model, shared(f"models/{model}/model.safetensors"))


def speed(size: int, rounds: int) -> Iterator[Figure]:
    """Weights per second for both kinds of scales and for bitsandbytes."""
    import bitsandbytes.functional as bitsandbytes

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    specs: dict[str, Scales] = {"halfbyte absmax": "absmax", "halfbyte mse": "mse"}
    sides = {
        name: lambda s=scales: ops.quantize_4bit(weight, QuantSpec(scales=s))
        for name, scales in specs.items()
    }
    theirs = "bitsandbytes"
    part = weight[: max(64, size // 8)]  # it is slower by an order of magnitude: an eighth, counted as such
    sides[theirs] = lambda: bitsandbytes.quantize_4bit(part, quant_type="nf4", compress_statistics=True)
    seconds = time_sides(sides, rounds=rounds)
    rates = {name: (part if name == theirs else weight).numel() / seconds[name] / 1e6 for name in sides}
    where = f"NF4 with double quantization, {size} x {size} bfloat16, {torch.get_num_threads()} threads"
    yield Figure.at_least(f"{where}: absmax", rates["halfbyte absmax"], "M weights/s", ABSMAX_FLOOR)
    yield Figure.at_least(f"{where}: mse", rates["halfbyte mse"], "M weights/s", MSE_FLOOR)
    yield Figure(f"{where}: bitsandbytes", rates[theirs], "M weights/s")
    yield Figure(f"{where}: absmax against bitsandbytes", rates["halfbyte absmax"] / rates[theirs], "x")


def folder(layers: int, rounds: int) -> Iterator[Figure]:
    """A folder quantised, against the disk alone: the same bytes read, and as many written."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("HALFBYTE_BENCH_DISK")) as place:
        source, target = Path(place) / "source", Path(place) / "target"
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_hidden_layers=layers
        )
        nbytes = 2 * layers * (4 * 2048**2 + 3 * 2048 * 5632) + 4 * 32000 * 2048
        free = shutil.disk_usage(place).free
        if free < 2 * nbytes:
            sys.exit(f"{place} has {free:,} bytes free, {2 * nbytes:,} are needed; set HALFBYTE_BENCH_DISK")
        write_llama(source, config)
        files = sorted(source.glob("*.safetensors"))
        alone, whole = [], []
        for number in range(rounds + 1):
            forget(files)
            begin = time.perf_counter()
            quantise_folder(prepare(source, QuantSpec()), target)
            took = time.perf_counter() - begin
            result = target / "model.safetensors"
            written = result.stat().st_size
            shutil.rmtree(target)
            forget(files)
            disk = read_all(files) + write_all(Path(place) / "written", written)
            if number:  # the first is a rehearsal: libraries are imported, threads begun
                whole.append(took)
                alone.append(disk)
        read = sum(file.stat().st_size for file in files)
        name = f"halfbyte quantize of {read / 1e9:.1f} GB in {len(files)} shards to {written / 1e9:.1f} GB"
        seconds, disk = statistics.median(whole), statistics.median(alone)
        yield Figure(name, read / seconds / 1e9, "GB/s read")
        yield Figure(f"{name}: the disk alone", read / disk / 1e9, "GB/s read")
        ratio = statistics.median(a / w for a, w in zip(alone, whole, strict=True))
        yield Figure.at_least(f"{name}: against the disk alone", ratio, "x", DISK_FLOOR)


def write_llama(target: Path, config: LlamaConfig) -> None:
    """A bfloat16 Llama of one shard per eight layers; all layers have the same numbers."""
    D, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {f"self_attn.{p}_proj": (D, D) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (I, D), "mlp.up_proj": (I, D), "mlp.down_proj": (D, I)}
    layer = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}
    layer |= {name: torch.ones(D).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")}
    embedding = torch.randn(V, D).bfloat16()
    outside = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    shards = [{**outside, "model.norm.weight": layer["input_layernorm"].clone()}]
    for first in range(0, config.num_hidden_layers, 8):
        numbers = range(first, min(first + 8, config.num_hidden_layers))
        shards.append(
            {f"model.layers.{n}.{name}.weight": t.clone() for n in numbers for name, t in layer.items()}
        )
    target.mkdir()
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, target / f"model-{number:05}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number:05}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(target)


def forget(files: list[Path]) -> None:
    """Take files out of the system's cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path]) -> float:
    """Seconds for reading files from the first byte to the last, past the system's cache."""
    block = bytes_of(aligned_bytes(BLOCK))
    begin = time.perf_counter()
    for file in files:
        nbytes = file.stat().st_size
        done = sum(read_direct(file, first, block) for first in range(0, nbytes, BLOCK))
        if done != nbytes:
            sys.exit(f"{file} was not read past the system's cache; set HALFBYTE_BENCH_DISK to another disk")
    return time.perf_counter() - begin


def write_all(file: Path, nbytes: int) -> float:
    """Seconds for writing that many bytes past the system's cache, until the disk has them."""
    block = bytes_of(aligned_bytes(BLOCK))
    block[:] = os.urandom(BLOCK)
    begin = time.perf_counter()
    handle = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
    for first in range(0, nbytes, BLOCK):
        os.write(handle, block[: -(-min(BLOCK, nbytes - first) // PAGE) * PAGE])
    os.fdatasync(handle)
    os.close(handle)
    took = time.perf_counter() - begin
    file.unlink()
    return took


def error(model: str, path: Path) -> Iterator[Figure]:
    """Squared weight error of both kinds of scales over a model's projection matrices."""
    squared, nbytes = dict.fromkeys(("absmax", "mse"), 0.0), dict.fromkeys(("absmax", "mse"), 0)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if "embed" in name or len(file.get_slice(name).get_shape()) != 2:
                continue
            weight = file.get_tensor(name)
            for scales in ("absmax", "mse"):
                quantised = ops.quantize_4bit(weight, QuantSpec(scales=scales))
                off = ops.dequantize_4bit(quantised, torch.float32) - weight.float()
                squared[scales] += float(off.double().square().sum())
                nbytes[scales] += quantised.nbytes
    saved = 100 * (1 - squared["mse"] / squared["absmax"])
    yield Figure.at_least(f"{model}: squared weight error saved by mse scales", saved, "%", SAVED_FLOOR)
    yield Figure.at_most(
        f"{model}: bytes of mse over bytes of absmax", nbytes["mse"] / nbytes["absmax"], "x", 1.0
    )


if __name__ == "__main__":
    sys.exit(run("quantize", measure))
