"""Memory and time of the output head and its loss: in chunks, beside all logits at once.

It owns the sizes measured; it must not know how a loss is computed.

    python bench/loss.py [--quick]

Both sides get the same hidden states and the same frozen head in bfloat16 and give the loss and its gradient for the
hidden states. Theirs, plain: `F.cross_entropy(hidden @ W.T)` in bfloat16, the least that autograd can hold. Theirs,
transformers: its own loss for causal models, which widens the logits to float32. Memory: each side in a process of
its own, the largest resident set above that with its inputs. Time: in turn, all threads, median.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from figures import Figure, run, time_sides
from halfbyte.kernels.loss import head_loss

SHARE = 1 / 20
"""Most of the memory of all logits that the chunks may take."""

LARGE = (4096, 128_256, 2048)  # trained tokens, vocabulary (that of Llama 3), hidden size
SMALL = (1024, 128_256, 256)
TIMED = (2048, 32_000, 2048)  # TinyLlama-1.1B's head
TIMED_QUICK = (256, 32_000, 512)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return head_loss(hidden, weight, targets, divisor=len(hidden)).objective


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def transformers(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = F.linear(hidden, weight)[None]
    loss: Tensor = ForCausalLMLoss(logits, None, len(weight), shift_labels=targets[None])
    return loss


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "halfbyte": ours,
    "plain": plain,
    "transformers": transformers,
}


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    sizes = SMALL if quick else LARGE
    yield from memory(sizes, None if quick else SHARE)
    yield from speed(TIMED_QUICK if quick else TIMED, rounds=3 if quick else 7)


def memory(sizes: tuple[int, int, int], floor: float | None) -> Iterator[Figure]:
    """Peak memory of each side, and ours as a share of theirs."""
    where = f"head and loss of {sizes[0]} tokens x {sizes[1]}, hidden {sizes[2]}, bfloat16"
    peaks = {side: peak_bytes(side, sizes) for side in SIDES}
    for side, found in peaks.items():
        yield Figure(f"{where}: memory, {side}", None if found is None else found / 2**20, "MiB")
    for side in ("plain", "transformers"):
        mine, theirs = peaks["halfbyte"], peaks[side]
        share = None if mine is None or theirs is None else mine / theirs
        claim = f"{where}: memory as a share of that of {side}"
        yield Figure(claim, share, "") if floor is None else Figure.at_most(claim, share, "", floor)


def speed(sizes: tuple[int, int, int], rounds: int) -> Iterator[Figure]:
    """Seconds of each side, and how many times faster ours is."""
    given = inputs(*sizes)
    seconds = time_sides(
        {name: lambda side=side: side(*given).backward() for name, side in SIDES.items()}, rounds=rounds
    )
    where = f"head and loss of {sizes[0]} tokens x {sizes[1]}, hidden {sizes[2]}, {torch.get_num_threads()} threads"
    for name, found in seconds.items():
        yield Figure(f"{where}: time, {name}", found, "s")
    for name in ("plain", "transformers"):
        yield Figure(f"{where}: speed against {name}", seconds[name] / seconds["halfbyte"], "x")


def inputs(P: int, V: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that want a gradient, a frozen head, targets."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(V, H, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    hidden = torch.empty(P, H, dtype=torch.bfloat16).normal_(generator=generator)
    return hidden.requires_grad_(), weight, torch.randint(0, V, (P,), generator=generator)


def peak_bytes(side: str, sizes: tuple[int, int, int]) -> int | None:
    """What a side needs above its inputs, measured in a new process; None where the system does not count."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "--peak", side, *map(str, sizes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(side: str, *sizes: str) -> None:
    """The measured process: loss and gradient once."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    P, V, H = map(int, sizes)
    SIDES[side](*inputs(2, 64, H)).backward()  # the libraries are loaded
    given = inputs(P, V, H)
    before = resident("VmRSS")
    SIDES[side](*given).backward()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
        sys.exit(0)
    sys.exit(run("loss", measure))
