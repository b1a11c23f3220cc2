"""Our training step against the peak of the machine, on one thread and on all, and where its time goes.

It owns the count of useful operations; it must not know how a step computes.

    python bench/step.py [--quick]

The model has TinyLlama-1.1B's shape with 8 layers and random weights in NF4, LoRA of rank 16 beside all linear
layers, one row, every token trained, everything kept for the backward pass. Useful operations: 4 per frozen weight
and token, 4 per weight of the head, 6 per number of the adapter, and 7 · T · T / 2 products of heads for causal
attention, two operations each. The peak is measured between the steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import halfbyte
from figures import Figure, run
from halfbyte.data.pack import UNTRAINED
from halfbyte.kernels import limits
from halfbyte.model.heads import trained_loss
from step_vs_peers import model_folder

LAYERS, TOKENS = 8, (512, 2048)
FLOOR = 0.65
PARTS = {
    "products": ("halfbyte::linear", "halfbyte::linear_grad"),
    "attention": ("halfbyte::attention", "halfbyte::attention_grad"),
    "head and loss": ("halfbyte::head_loss",),
    "norms": ("rms_norm",),
    "rotary embedding": ("rotate",),
    "activations": ("gated",),
}
"""Where time goes, by parts of operations' names; the rest is Python, autograd, casts and copies."""


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    layers, lengths, rounds = (1, (128,), 3) if quick else (LAYERS, TOKENS, 5)
    model = halfbyte.load(model_folder(layers), quantization="nf4", dtype="bfloat16")
    halfbyte.add_lora(model, r=16, alpha=32)
    model.train()
    for tokens in lengths:
        speeds = {}
        for threads in sorted({1, torch.get_num_threads()}):
            with _threads(threads):
                seconds, peak = _timed(lambda t=tokens: step(model, t), rounds)
            speeds[threads] = tokens / seconds
            where = f"step of {tokens} tokens, {layers} layers, {threads} threads"
            yield Figure(f"{where}: speed", speeds[threads], "tokens/s")
            share = useful_operations(model, tokens) / seconds / peak
            promised = not quick and threads > 1
            claim = f"{where}: useful operations over the measured bf16 peak"
            yield Figure.at_least(claim, share, "", FLOOR) if promised else Figure(claim, share, "")
        fastest, slowest = max(speeds.values()), min(speeds.values())
        yield Figure(
            f"step of {tokens} tokens, {layers} layers: all threads over one", fastest / slowest, "x"
        )
        yield from parts(model, tokens)


def step(model: PreTrainedModel, tokens: int) -> None:
    """Forward, loss and backward of one row; the gradients are dropped."""
    ids = torch.arange(tokens)[None] % model.config.vocab_size
    labels = ids.clone()
    labels[:, 0] = UNTRAINED
    loss = trained_loss(model, {"input_ids": ids, "use_cache": False}, labels, divisor=tokens - 1)
    loss.objective.backward()
    model.zero_grad(set_to_none=True)


def useful_operations(model: PreTrainedModel, tokens: int) -> float:
    """What no way of computing the step could leave out."""
    config = model.config
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * D, config.num_key_value_heads * D
    frozen = config.num_hidden_layers * (2 * C * q + 2 * C * kv + 3 * C * F)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_token = 4 * frozen + 4 * C * config.vocab_size + 6 * trained
    attention = config.num_hidden_layers * 7 * tokens * tokens / 2 * q * 2
    return tokens * per_token + attention


def parts(model: PreTrainedModel, tokens: int) -> Iterator[Figure]:
    """The share of a step's time of each kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(model, tokens)
    times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    total, known = sum(times.values()), 0.0
    for name, keys in PARTS.items():
        spent = sum(time for key, time in times.items() if any(part in key for part in keys))
        if name == "products":
            spent = sum(times.get(key, 0.0) for key in keys)
        if name == "head and loss":
            spent = sum(time for key, time in times.items() if "head_loss" in key)
        known += spent
        yield Figure(f"step of {tokens} tokens: time in {name}", spent / total, "share")
    yield Figure(f"step of {tokens} tokens: time in all else", 1 - known / total, "share")


def _timed(work: Callable[[], None], rounds: int) -> tuple[float, float]:
    """Median seconds of the work, and the median peak between its rounds."""
    seconds, peaks = [], []
    work()
    for _ in range(rounds):
        peaks.append(limits.peak_flops(torch.bfloat16))
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return median(seconds), median(peaks)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many threads of torch within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    sys.exit(run("step", measure))
