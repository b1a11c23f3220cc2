"""Lion: an optimizer that steps by the sign of an averaged gradient.

It owns Lion's arithmetic and state; it knows nothing of models, schedules or settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum with decoupled weight decay; its state is one number per weight.

    With gradient g and average m, weights w step by lr · (sign(β₁ m + (1 − β₁) g) + λ w), then m becomes
    β₂ m + (1 − β₂) g. All steps have the same length, so that the learning rate is 3 to 10 times smaller than
    AdamW's.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate; a group may have its own.
        betas: Decay of the average in the step, and of the average kept.
        weight_decay: λ; a group may have its own.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                direction = torch.lerp(parameter.grad, average, beta1).sign_()
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                average.lerp_(parameter.grad, 1.0 - beta2)
