"""All numbers of a training run that change from step to step, as named tensors and back.

It owns what must be kept so that a run can go on as if it had never stopped; it must not know files, steps or rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from halfbyte.errors import TrainError
from halfbyte.train.adamw import SmallAdamW

_PARAMETER, _OPTIMIZER, _CPU, _CUDA = "parameter/", "optimizer/", "random/cpu", "random/cuda/"


def random_state() -> dict[str, Tensor]:
    """The states of torch's random generators."""
    found = {_CPU: torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"{_CUDA}{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def capture(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, random: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state of a run.

    Args:
        parameters: What is trained, by name.
        optimizer: Holds these parameters and no others.
        random: From `random_state`, at the end of the last whole step.
    """
    found = {_PARAMETER + name: p.detach().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{_OPTIMIZER}{name}/{key}"] = value.detach().contiguous()
    return {**found, **random}


def restore(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put a captured state back, bit by bit.

    Args:
        tensors: From `capture`.
        parameters: What is trained, by name, of the same shapes.
        optimizer: As it was built, before its first step.

    Raises:
        TrainError: HB511 if the state is of other parameters; nothing is changed then. HB515 from its pages.
    """
    stored = {n.removeprefix(_PARAMETER): t for n, t in tensors.items() if n.startswith(_PARAMETER)}
    differ = [n for n in stored.keys() | parameters.keys() if not _alike(stored.get(n), parameters.get(n))]
    if differ:
        raise TrainError(
            "HB511",
            f"it holds other parameters than this model trains: {', '.join(sorted(differ)[:5])}",
            fix="resume with the settings and the base model that the run began with",
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(stored[name])
        begin = f"{_OPTIMIZER}{name}/"
        state = {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
        if state and isinstance(optimizer, SmallAdamW):
            optimizer.put_state(parameter, state)
        elif state:
            optimizer.state[parameter] = {
                key: value.to(parameter.device if value.dim() else value.device)
                for key, value in state.items()
            }
    torch.set_rng_state(tensors[_CPU])
    cuda = [tensors[n] for n in sorted(n for n in tensors if n.startswith(_CUDA))]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _alike(stored: Tensor | None, parameter: Tensor | None) -> bool:
    return (
        stored is not None
        and parameter is not None
        and stored.shape == parameter.shape
        and stored.dtype == parameter.dtype
    )
