"""Who sees whom in attention, and what its backward pass needs, as every backend gets them.

It owns these two records and what documents mean; it must not know how attention is computed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
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

    def visible(self, B: int, T: int) -> Tensor:
        """Which token sees which, as the whole matrix.

        Returns:
            (B, T, T) bool; entry (b, i, j) says whether token i of row b sees token j.
        """
        document = torch.full((B, T), -1)
        for number, (row, first, end) in enumerate(self.documents.tolist()):
            document[row, first:end] = number
        seen = (document[:, :, None] == document[:, None, :]) & (document[:, :, None] >= 0)
        behind = torch.arange(T)[:, None] - torch.arange(T)[None, :]  # i - j
        if self.causal:
            seen = seen & (behind >= 0)
        if self.window:
            seen = seen & (behind < self.window)
        return seen


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
