"""The loss of rows of logits on the CPU through the compiled module.

It owns the passage of logits to the compiled kernels; it must not check arguments (that is `kernels.loss`) nor
compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.cpu.calls import DTYPES, native, threads
from halfbyte.kernels.loss_terms import Gradient, LossTerms


def loss_rows(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    terms: LossTerms,
    gradient: Gradient | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.loss_rows`."""
    nll = logits.new_empty(len(logits), dtype=torch.float64)
    objective = torch.empty_like(nll)
    native().loss_rows(
        logits.data_ptr(),
        *logits.shape,
        targets.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        tuple(terms),
        None if gradient is None else DTYPES[gradient.dtype],
        0.0 if gradient is None else gradient.factor,
        nll.data_ptr(),
        objective.data_ptr(),
        threads(),
    )
    return nll, objective
