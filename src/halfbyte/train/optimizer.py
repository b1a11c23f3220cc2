"""AdamW over the trainable parameters, and clipping by global norm.

It owns which parameters are trained and decayed; it knows nothing of losses, schedules or steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from halfbyte.errors import TrainError

if TYPE_CHECKING:
    from halfbyte.settings import TrainConfig

NAMES_SHOWN = 5


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters to train, by name; each must be float32, the precision small updates need.

    Raises:
        TrainError: HB505 if there are none, or one is not float32.
    """
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise TrainError(
            "HB505",
            "the model has no parameter that requires a gradient",
            fix="add an adapter first (halfbyte.add_lora), or use method: full",
        )
    wrong = [f"{name} ({p.dtype})" for name, p in chosen.items() if p.dtype != torch.float32]
    if wrong:
        shown = ", ".join(wrong[:NAMES_SHOWN]) + (", ..." if len(wrong) > NAMES_SHOWN else "")
        raise TrainError(
            "HB505",
            f"{len(wrong)} trainable parameters are not float32: {shown}",
            fix="load the model in float32 for method: full; bfloat16 updates of this size round to nothing",
        )
    return chosen


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on matrices; vectors (norms, biases) are not decayed.

    Args:
        model: Model whose trainable parameters are float32.
        config: Learning rate, betas, eps and weight decay.

    Raises:
        TrainError: HB505.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.
    """
    parameters = list(trainable_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    """Scale all gradients so that their global L2 norm is at most max_norm.

    Args:
        optimizer: Holds the parameters; those without a gradient count as zero.
        max_norm: Largest norm allowed; None or 0 only measures.

    Returns:
        The norm before clipping; not finite if any gradient is not, in which case nothing is scaled.
    """
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if max_norm and max_norm < norm < float("inf"):
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
