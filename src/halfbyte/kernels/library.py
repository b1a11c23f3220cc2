"""How an operation becomes part of torch as `halfbyte::name`, with its shapes and its gradient.

It owns the registration; it must not know any operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from halfbyte.kernels.backends import implementation

LIBRARY: Any = torch.library.Library("halfbyte", "DEF")  # type: ignore[no-untyped-call]


def define(
    name: str,
    schema: str,
    compute: Callable[..., Any],
    shape: Callable[..., Any],
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Define an operation.

    Args:
        name: Its name in `torch.ops.halfbyte`.
        schema: Arguments and results in torch's notation.
        compute: Computes it, for every device.
        shape: Makes results of the right shape, strides and dtype without computing.
        gradient: The backward function and the one that saves what it needs; None where there is none.
    """
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"halfbyte::{name}", shape, lib=LIBRARY)
    if gradient is not None:
        backward, save = gradient
        torch.library.register_autograd(f"halfbyte::{name}", backward, setup_context=save, lib=LIBRARY)


def by_backend(operation: str) -> Callable[..., Any]:
    """The function that hands an operation's arguments to the backend for its first one's dtype and device."""

    def compute(*arguments: Any) -> Any:
        first = arguments[0]
        return implementation(operation, first.dtype, first.device)(*arguments)

    return compute
