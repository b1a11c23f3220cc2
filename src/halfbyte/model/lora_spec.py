"""What adapters are added, and where, as data: ranks, scales and which names they mean.

It owns the settings of LoRA and PEFT's rules for names; it must not know modules or tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args

from halfbyte.errors import ModelError

ALL_LINEAR: Literal["all-linear"] = "all-linear"
Bias = Literal["none", "all", "lora_only"]
Init = Literal["default", "gaussian", "pissa", "loftq"]
DECOMPOSING: tuple[Init, ...] = ("pissa", "loftq")
"""Initialisations that take singular vectors of the weight, and change the base."""

MOST_REPEATS = 3
"""Repeats a pattern of names may have: each makes matching slower by a factor of the name's length."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What adapters are added, and where.

    Attributes:
        r: Rank of the two matrices, ≥ 1.
        alpha: The branch is scaled by alpha / r.
        dropout: Probability with which an input of the branch is zeroed in training, 0 ≤ dropout < 1.
        target_modules: `all-linear` is every linear layer but the output head; else names, each a module's
            full name or the end of it after a dot.
        rank_stabilised: Scale by alpha / √r instead.
        init: How the two matrices begin; see `lora_init.INITS`.
        init_iterations: Rounds of quantising and decomposing, for `pissa` and `loftq`.
        dora: Train the length of each row of the weight apart from its direction.
        rank_pattern: Rank of the layers a pattern means, in place of r; the first that matches counts.
        alpha_pattern: As `rank_pattern`, for alpha.
        modules_to_save: Modules trained whole, in float32; names as in `target_modules`.
        bias: Which biases of the base train beside: those of adapted layers, or all there are.

    Raises:
        ModelError: HB321 naming every value out of range.

    Source: LoRA (arXiv 2106.09685), section 4.1; rank-stabilised: arXiv 2312.03732; DoRA: arXiv 2402.09353.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | Sequence[str] = ALL_LINEAR
    rank_stabilised: bool = False
    init: Init = "default"
    init_iterations: int = 1
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    bias: Bias = "none"

    def __post_init__(self) -> None:
        ranks = {"r": self.r, **{f"rank_pattern of {key}": r for key, r in self.rank_pattern.items()}}
        alphas = {"alpha": self.alpha, **{f"alpha_pattern of {k}": a for k, a in self.alpha_pattern.items()}}
        faults = [f"{name} is {r}, expected at least 1" for name, r in ranks.items() if r < 1]
        if not 0.0 <= self.dropout < 1.0:
            faults.append(f"dropout is {self.dropout}, expected 0 ≤ dropout < 1")
        faults += [
            f"{name} is {alpha}, expected a finite number"
            for name, alpha in alphas.items()
            if not math.isfinite(alpha)
        ]
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            faults.append(
                f"target_modules is {self.target_modules!r}, expected {ALL_LINEAR!r} or a list of names"
            )
        if self.init not in get_args(Init):
            faults.append(f"init is {self.init!r}, expected one of {', '.join(get_args(Init))}")
        if self.bias not in get_args(Bias):
            faults.append(f"bias is {self.bias!r}, expected one of {', '.join(get_args(Bias))}")
        elif self.bias == "all" and self.modules_to_save:
            faults.append("bias is 'all', which modules_to_save, whose biases are copies, cannot be beside")
        if self.init_iterations < 1:
            faults.append(f"init_iterations is {self.init_iterations}, expected at least 1")
        elif self.init_iterations > 1 and self.init not in DECOMPOSING:
            faults.append(
                f"init_iterations is {self.init_iterations}, which only {' and '.join(DECOMPOSING)} read"
            )
        if self.init in DECOMPOSING:
            faults += [
                f"{name} is {alpha}, expected more than 0 for init {self.init}"
                for name, alpha in alphas.items()
                if alpha <= 0
            ]
        faults += [
            f"the pattern {pattern!r} {fault}"
            for pattern in (*self.rank_pattern, *self.alpha_pattern)
            if (fault := _pattern_fault(pattern))
        ]
        if faults:
            raise ModelError("HB321", "; ".join(faults), where="lora", fix="correct the values named")

    @property
    def scale(self) -> float:
        """Factor of the branch."""
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)

    def resized(self, r: int) -> LoraSpec:
        """The same scale at another rank."""
        alpha = self.scale * (math.sqrt(r) if self.rank_stabilised else r)
        return replace(self, r=r, alpha=alpha)

    def at(self, name: str) -> LoraSpec:
        """What is meant for one layer: its own rank and alpha, the patterns resolved."""
        return replace(
            self,
            r=pattern_value(self.rank_pattern, name, self.r),
            alpha=pattern_value(self.alpha_pattern, name, self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )


def matches(name: str, target: str) -> bool:
    """PEFT's rule for one name of a list: the full name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def pattern_value(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """The value of the first pattern that means this name: PEFT's rule, a regular expression for its end."""
    for pattern, value in patterns.items():
        if matches_pattern(name, pattern):
            return value
    return default


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a pattern means a name, as a regular expression for all of it or its end after a dot.

    Source: `get_pattern_key` of PEFT.
    """
    return re.match(_expression(pattern), name) is not None


def _expression(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _pattern_fault(pattern: str) -> str:
    """What is wrong with a pattern; one that repeats a group, or repeats often, can take for ever."""
    try:
        re.compile(_expression(pattern))
    except re.error as error:
        return f"is no regular expression: {error}"
    if re.search(r"\)[*+{]|\(\?[P(]|\\[1-9]", pattern) or len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS:
        return f"repeats a group, refers to one, or has more than {MOST_REPEATS} repeats"
    return ""
