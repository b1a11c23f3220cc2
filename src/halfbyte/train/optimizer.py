"""The optimizers over the trainable parameters, and clipping by global norm.

It owns which parameters are trained, decayed, and trained faster than others; it knows nothing of losses,
schedules or steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from halfbyte.errors import TrainError
from halfbyte.train.adamw import LEAST, Bits, SmallAdamW, buffer_bytes, form_of, lay_out
from halfbyte.train.lion import Lion
from halfbyte.train.paging import MakePages, PageFile

if TYPE_CHECKING:
    from halfbyte.settings import Optimizer, TrainConfig

NAMES_SHOWN = 5

Group = dict[str, Any]


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


def build_optimizer(
    model: torch.nn.Module, config: TrainConfig, pages: MakePages | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a run, its parameters in groups of one learning rate and weight decay each.

    Args:
        model: Model whose trainable parameters are float32.
        config: Optimizer, learning rate and its ratio of LoRA's matrices, betas, eps and weight decay.
        pages: Makes the pages of a paged optimizer; None puts them where temporary files lie.

    Raises:
        TrainError: HB505; HB514 where there is no room for pages.
    """
    groups = parameter_groups(trainable_parameters(model), config)
    pages = pages or partial(PageFile, Path(tempfile.gettempdir()))
    return OPTIMIZERS[config.optimizer](groups, config, pages)


def parameter_groups(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> list[Group]:
    """Parameters by weight decay and learning rate: matrices are decayed, vectors (norms, biases) are not.

    With LoRA+, the adapter's B matrices, and vectors, have the learning rate times its ratio.

    Args:
        parameters: The parameters to train, by name.
        config: Weight decay and the ratio.

    Returns:
        Groups that torch's optimizers take, none empty; `lr_ratio` is what the run's learning rate is multiplied by.

    Source: Hayou et al., LoRA+ (2024), section 4; the same groups as PEFT's `create_loraplus_optimizer`.
    """
    grouped: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].ndim < 2):
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        fast = parameter.ndim < 2 or name.endswith("lora_B")
        ratio = config.lora_plus_ratio if config.lora_plus_ratio is not None and fast else 1.0
        grouped.setdefault((decay, ratio), []).append(parameter)
    return [
        {"params": chosen, "weight_decay": decay, "lr": config.learning_rate * ratio, "lr_ratio": ratio}
        for (decay, ratio), chosen in grouped.items()
    ]


def _adamw(groups: list[Group], config: TrainConfig, _: MakePages) -> torch.optim.Optimizer:
    """Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2."""
    return torch.optim.AdamW(groups, betas=_betas(config, 0.999), eps=config.eps or 1e-8, fused=True)


def _small_adamw(groups: list[Group], config: TrainConfig, pages: MakePages) -> torch.optim.Optimizer:
    bits, paged = SMALL[config.optimizer]
    return SmallAdamW(
        groups,
        bits=bits,
        pages=pages if paged else None,
        betas=_betas(config, 0.999),
        eps=config.eps or 1e-8,
    )


def _lion(groups: list[Group], config: TrainConfig, _: MakePages) -> torch.optim.Optimizer:
    return Lion(groups, betas=_betas(config, 0.99))


def _adafactor(groups: list[Group], config: TrainConfig, _: MakePages) -> torch.optim.Optimizer:
    """Source: Shazeer and Stern, Adafactor (2018), algorithms 4 and 5, as torch has it."""
    return torch.optim.Adafactor(groups)


def _sgd(groups: list[Group], config: TrainConfig, _: MakePages) -> torch.optim.Optimizer:
    """Without momentum torch's L2 penalty is the decoupled weight decay."""
    return torch.optim.SGD(groups)


def _betas(config: TrainConfig, beta2: float) -> tuple[float, float]:
    """The betas that are set, else 0.9 and the one given."""
    return (
        0.9 if config.beta1 is None else config.beta1,
        beta2 if config.beta2 is None else config.beta2,
    )


SMALL: dict[str, tuple[Bits, bool]] = {
    "adamw_8bit": (8, False),
    "paged_adamw": (32, True),
    "paged_adamw_8bit": (8, True),
}
"""Bits of AdamW's averages, and whether they are paged."""

OPTIMIZERS: dict[str, Callable[[list[Group], TrainConfig, MakePages], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    **dict.fromkeys(SMALL, _small_adamw),
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
}


class StateBytes(NamedTuple):
    """What the state of an optimizer takes.

    Attributes:
        memory: Bytes in memory from the first step on, without `buffers`.
        disk: Bytes of its pages.
        buffers: Bytes in memory through which pages go.
    """

    memory: int
    disk: int
    buffers: int


def state_bytes(optimizer: Optimizer, counts: Sequence[int]) -> StateBytes:
    """What the state of an optimizer takes for parameters of so many numbers each.

    Args:
        optimizer: As `train.optimizer` has it.
        counts: Numbers of each parameter.

    Returns:
        Bytes, exact but for adafactor, which keeps rows and columns of a matrix: at most a number per number.
    """
    if optimizer not in SMALL:
        each = {"adamw": 8, "lion": 4, "adafactor": 4, "sgd": 0}[optimizer]
        step = _STEP_BYTES if optimizer in ("adamw", "adafactor") else 0
        return StateBytes(sum(each * n + step for n in counts), 0, 0)
    bits, paged = SMALL[optimizer]
    inside = sum(form_of(bits, n).nbytes(n) for n in counts if not paged or n < LEAST)
    disk = lay_out(counts, bits)[1] if paged else 0
    buffers = 2 * buffer_bytes(counts, bits) if paged else 0
    return StateBytes(inside + _STEP_BYTES * len(counts), disk, buffers)


def to_come_bytes(model: torch.nn.Module, config: TrainConfig) -> int:
    """What training will hold besides the weights: their gradients, and the optimizer's state."""
    counts = [parameter.numel() for parameter in trainable_parameters(model).values()]
    state = state_bytes(config.optimizer, counts)
    return 4 * sum(counts) + state.memory + state.buffers


_STEP_BYTES = 4  # a float32 that counts


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


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
