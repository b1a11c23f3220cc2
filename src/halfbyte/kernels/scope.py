"""Who sees whom in attention, and what its backward pass needs, as every backend gets them.

It owns these two records and the check of documents; it must not know how attention is computed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from halfbyte.errors import KernelError


class Scope(NamedTuple):
    """What a token attends to, and how strongly.

    Args:
        documents: (n, 3) int32, rows [batch row, first token, token after the last].
        scale: What scores are multiplied by.
        causal: No token sees a later one.
        window: Token i sees token j only if i - window < j; 0 for no such limit.
    """

    documents: Tensor
    scale: float
    causal: bool
    window: int

    def check_documents(self, B: int, T: int) -> None:
        """Refuse documents that leave a batch of B rows of T tokens, or that overlap.

        Raises:
            KernelError: HB402.
        """
        rows: list[list[int]] = self.documents.tolist()
        for row, first, end in rows:
            if not (0 <= row < B and 0 <= first < end <= T):
                what = f"attention: document {[row, first, end]} lies outside of {B} rows of {T} tokens, or is empty"
                raise KernelError("HB402", what, fix="give [batch row, first token, token after the last]")
        for before, after in pairwise(sorted(rows)):
            if before[0] == after[0] and after[1] < before[2]:
                what = f"attention: documents {before} and {after} overlap"
                raise KernelError("HB402", what, fix="give every token to at most one document")


class Saved(NamedTuple):
    """The inputs and results of a forward pass.

    Args:
        q: (B, T, H, D).
        k: (B, T, Hkv, D).
        v: (B, T, Hkv, D).
        out: (B, T, H, D).
        lse: (B, H, T), logarithms of the sums of exponentials of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
