"""How fast attention is, forward and backward, as a share of the machine's peak and beside torch's own.

It owns the sizes measured; it must not know how attention is computed.

    python bench/attention.py [--quick]

Work is counted as what causal attention needs: two products forward and five backward over half of T x T scores, for
every query head. Peak is torch's bfloat16 product of two 2048 x 2048 matrices in the same run. torch's side is
scaled_dot_product_attention with is_causal on keys and values repeated beforehand, forward and backward; it runs in
turn with ours on all threads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from figures import Figure, run, time_sides
from halfbyte.kernels.attention import attention_backward, attention_forward

H, HKV, D = 32, 4, 64
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}
SHARE_FLOORS = {512: 40.0, 2048: 55.0}  # per cent of peak, forward and backward
RATIO_FLOOR = 2.0  # against torch


def measure(quick: bool) -> Iterator[Figure]:
    """Yields the figures."""
    for T in (512, 2048) if quick else (512, 2048, 8192):
        yield from length(T, torch.bfloat16, rounds=3 if T == 8192 else 9)
    yield from length(2048, torch.float32, rounds=5)


def length(T: int, dtype: torch.dtype, rounds: int) -> Iterator[Figure]:
    """One document of T tokens."""
    random = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, T, heads, D, generator=random).to(dtype) for heads in (H, HKV, HKV, H))
    documents = torch.tensor([[0, 0, T]], dtype=torch.int32)
    out, lse = attention_forward(q, k, v, documents, scale=D**-0.5)
    matrix = torch.randn(2048, 2048, generator=random).to(dtype)
    theirs = [repeated(heads).requires_grad_() for heads in (q, k, v)]
    dtheirs = dout.transpose(1, 2).contiguous()

    def torchs() -> None:
        result = scaled_dot_product_attention(*theirs, is_causal=True)
        torch.autograd.grad(result, theirs, dtheirs)

    sides = {
        "forward": lambda: attention_forward(q, k, v, documents, scale=D**-0.5),
        "backward": lambda: attention_backward(dout, q, k, v, out, lse, documents, scale=D**-0.5),
        "torch": torchs,
        "peak": lambda: matrix @ matrix,
    }
    seconds = time_sides(sides, rounds=rounds, calls=max(1, 2048 // T))
    seconds["both"] = seconds["forward"] + seconds["backward"]
    peak = 2 * 2048**3 / seconds["peak"] / 1e9
    name = str(dtype).removeprefix("torch.")
    where = f"T {T}, H {H}, Hkv {HKV}, D {D}, causal {name}, {torch.get_num_threads()} threads"
    rates = {part: count * T * T * H * D / seconds[part] / 1e9 for part, count in PRODUCTS.items()}
    for part, rate in rates.items():
        yield Figure(f"{where}: {part}", rate, "GFLOP/s")
    share = 100 * rates["both"] / peak
    claim = f"{where}: share of torch's product"
    floored = dtype is torch.bfloat16 and T in SHARE_FLOORS
    yield Figure.at_least(claim, share, "%", SHARE_FLOORS[T]) if floored else Figure(claim, share, "%")
    ratio = seconds["torch"] / seconds["both"]
    claim = f"{where}: against scaled_dot_product_attention"
    yield Figure.at_least(claim, ratio, "x", RATIO_FLOOR) if floored else Figure(claim, ratio, "x")


def repeated(heads: Tensor) -> Tensor:
    """(B, T, heads, D) as (B, H, T, D), each head repeated for its group."""
    return heads.transpose(1, 2).repeat_interleave(H // heads.shape[2], dim=1).contiguous()


if __name__ == "__main__":
    sys.exit(run("attention", measure))
