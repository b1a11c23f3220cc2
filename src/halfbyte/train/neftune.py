"""NEFTune: noise on the input embeddings while a model is trained.

It owns how large the noise is and what it is drawn from; it must not know losses, optimizers or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import TrainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.pack import Batch


@contextmanager
def embedding_noise(
    model: PreTrainedModel, alpha: float | None, batch: Batch, draw: tuple[int, ...]
) -> Iterator[None]:
    """Within the block, the model's input embeddings of a batch come with noise, unless no gradient is asked for.

    Args:
        model: Causal language model of transformers.
        alpha: How much; None for none.
        batch: What the model is given within the block.
        draw: Numbers from 0 that decide the noise: seed, step, pass.

    Raises:
        TrainError: HB507 if the model did not ask its embeddings, so that it was trained without noise.

    Source: Jain et al., NEFTune (2023), algorithm 1.
    """
    if alpha is None:
        yield
        return
    asked = False

    def add_noise(_: torch.nn.Module, __: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        nonlocal asked
        if not torch.is_grad_enabled():  # measured on the way, such as what an objective compares with
            return embeddings
        asked = True
        return embeddings + noise_of(batch, embeddings.shape[-1], alpha, draw).to(embeddings)

    module = model.get_input_embeddings()
    hook = module.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
    if not asked:
        raise TrainError(
            "HB507",
            f"{type(model).__name__} does not call the embeddings it names, {type(module).__name__}",
            where="train.neftune_alpha",
            fix="set train.neftune_alpha to null",
        )


def noise_of(batch: Batch, width: int, alpha: float, draw: tuple[int, ...]) -> Tensor:
    """The noise of a batch: uniform, up to alpha / sqrt(L * width) for a document of L tokens, 0 on padding.

    Args:
        batch: Where each document lies.
        width: Numbers of an embedding, E.
        alpha: How much.
        draw: Numbers from 0 that decide the noise.

    Returns:
        (B, T, E) float32.
    """
    seed = int(np.random.SeedSequence(draw).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(*batch.input_ids.shape, width, generator=generator).mul_(2.0).sub_(1.0)
    largest = torch.zeros(batch.input_ids.shape)
    for row, begin, end in batch.documents.tolist():
        largest[row, begin:end] = alpha / sqrt((end - begin) * width)
    return noise.mul_(largest[..., None])
