"""LoRA adapters on disk, in PEFT's format: two files, read with suspicion and written whole.

It owns their names and settings; it must not know how the base model was loaded or what trained the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.files import PICKLED, contained, read_json
from halfbyte.model.linear4bit import Linear4bit, features, is_conv1d, is_linear
from halfbyte.model.lora import (
    ALL_LINEAR,
    LoraSpec,
    adapted_modules,
    matches,
    refuse_adapted,
    target_names,
    wrap,
)
from halfbyte.model.saving import whole_folder, write_json
from halfbyte.model.stored import StoredTensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")

# Settings of PEFT whose value says nothing about the numbers an adapter computes.
_INFORMATIVE = frozenset(
    (
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "fan_in_fan_out",
        "megatron_core",
    )
)
_INFORMATIVE_UNLESS_USED = frozenset(("qalora_group_size",))  # use_qalora itself is refused
_READ = frozenset(
    ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
)
# What these settings may be; others of the same name change the base or add what is not in the file.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "use_rslora": (True, False),
}


@dataclass(frozen=True, slots=True)
class _Settings:
    """What was understood of an `adapter_config.json`."""

    spec: LoraSpec
    targets: str | list[str]
    base: str


def save_adapter(model: PreTrainedModel, folder: str | Path, base: str) -> None:
    """Write the model's adapter as PEFT does.

    Args:
        model: A model with adapters.
        folder: Where to; written whole or not at all.
        base: Path or name of the base model, written for whoever loads the adapter.

    Raises:
        ModelError: HB322 when the model has no adapter, HB316 when the folder cannot be written.
    """
    layers = adapted_modules(model)
    if not layers:
        raise ModelError(
            "HB322", "the model has no adapter", where=type(model).__name__, fix="add one with add_lora"
        )
    spec = next(iter(layers.values())).spec
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.r,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rank_stabilised,
        "target_modules": _shortest_targets(model, list(layers)),
        "fan_in_fan_out": any(_stored_transposed(layer.base) for layer in layers.values()),
        "bias": "none",
        "init_lora_weights": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach()
    with whole_folder(folder) as work:
        write_json(work / CONFIG, settings)
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})


def _shortest_targets(model: PreTrainedModel, adapted: list[str]) -> list[str]:
    """The last parts of the names where they mean these modules and no others, else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in adapted})
    meant = [name for name, _ in model.named_modules() if any(matches(name, end) for end in ends)]
    return ends if meant == adapted else adapted


def _stored_transposed(base: nn.Module) -> bool:
    return base.from_conv1d if isinstance(base, Linear4bit) else is_conv1d(base)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> list[str]:
    """Put an adapter in PEFT's format on a base model; its matrices can train on, everything else is frozen.

    Every check is made before the model is touched.

    Args:
        model: The base model, in 4 bits or not, without adapters.
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        Names of the adapted modules, in the model's order.

    Raises:
        ModelError: HB303 pickled, HB305 outside the folder, HB307 damaged, HB311 not finite, HB322 the model
            has an adapter, HB323 unreadable, HB324 a feature that is not supported, HB325 made for another
            model.
    """
    refuse_adapted(model)
    folder = Path(folder)
    settings = _read_settings(folder)
    stored = _matrices(folder, read_header(contained(folder, WEIGHTS)))
    _refuse_misfit(model, folder, settings, stored)
    read = {
        name: {matrix: _values(tensor) for matrix, tensor in pair.items()} for name, pair in stored.items()
    }
    names = [name for name, _ in model.named_modules() if name in stored]
    wrap(model, dict.fromkeys(names, settings.spec), None)
    for name, layer in adapted_modules(model).items():
        layer.lora_A.data.copy_(read[name]["A"])
        layer.lora_B.data.copy_(read[name]["B"])
    return names


def _read_settings(folder: Path) -> _Settings:
    """Read `adapter_config.json`: every key is understood, or says nothing, or is refused."""
    if not (folder / CONFIG).is_file():
        raise ModelError(
            "HB323", f"there is no {CONFIG}", where=str(folder), fix="give the folder of an adapter"
        )
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        raise ModelError(
            "HB303" if pickled else "HB323",
            f"{', '.join(pickled)} can run any code when opened, and there is no {WEIGHTS}"
            if pickled
            else f"there is no {WEIGHTS}",
            where=str(folder),
            fix=f"save the adapter again as {WEIGHTS} (in PEFT: safe_serialization=True)",
        )
    file = contained(folder, CONFIG)
    config = read_json(file)
    unsupported = [f"{key} = {value!r}" for key, value in config.items() if not _understood(key, value)]
    if unsupported or "peft_type" not in config:
        raise ModelError(
            "HB324",
            ", ".join(unsupported) or "no peft_type is given, expected LORA",
            where=str(file),
            fix="use an adapter made without these: without them it gives other answers than it was trained to",
        )
    return _settings(file, config)


def _understood(key: str, value: object) -> bool:
    if key in _ALLOWED:
        return any(
            value is allowed or (isinstance(allowed, str) and value == allowed) for allowed in _ALLOWED[key]
        )
    return key in _READ | _INFORMATIVE | _INFORMATIVE_UNLESS_USED or value in (None, False, {}, [])


def _settings(file: Path, config: Mapping[str, Any]) -> _Settings:
    r: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout", 0.0)
    targets: Any = config.get("target_modules")
    faults = [] if type(r) is int else [f"r is {r!r}, expected a whole number"]
    faults += [
        f"{name} is {value!r}, expected a number"
        for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout))
        if type(value) not in (int, float)
    ]
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(type(t) is str for t in targets)
    ):
        faults.append(f"target_modules is {targets!r}, expected names or one pattern")
    if faults:
        raise ModelError("HB323", "; ".join(faults), where=str(file), fix="save the adapter again")
    spec = LoraSpec(r, alpha, dropout, rank_stabilised=config.get("use_rslora") is True)
    return _Settings(spec, targets, str(config.get("base_model_name_or_path")))


def _matrices(folder: Path, header: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Module name → its stored A and B."""
    pairs: dict[str, dict[str, StoredTensor]] = {}
    strange = []
    for key, tensor in header.items():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            pairs.setdefault(match["module"], {})[match["matrix"]] = tensor
    if strange:
        raise ModelError(
            "HB324",
            f"{len(strange)} tensors are not LoRA's two matrices: {', '.join(strange[:5])}",
            where=str(folder / WEIGHTS),
            fix="use a plain LoRA adapter of linear layers",
        )
    if single := sorted(name for name, pair in pairs.items() if len(pair) != 2):
        what = f"only one of the two matrices of {', '.join(single[:5])} is there"
        raise ModelError("HB323", what, where=str(folder / WEIGHTS), fix="save the adapter again")
    return pairs


def _refuse_misfit(
    model: PreTrainedModel,
    folder: Path,
    settings: _Settings,
    stored: Mapping[str, Mapping[str, StoredTensor]],
) -> None:
    """Refuse an adapter whose matrices do not fit this model, or are not those its settings name."""
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    faults = [f"the model has no linear layer {name}" for name in stored if name not in linear]
    rank = settings.spec.r
    for name, pair in stored.items():
        if name in linear:
            N, K = features(linear[name])
            got, expected = (pair["A"].shape, pair["B"].shape), ((rank, K), (N, rank))
            if got != expected:
                faults.append(
                    f"A and B of {name} are {got[0]} and {got[1]}, expected {expected[0]} and {expected[1]}"
                )
    if not faults:
        targeted = _targeted(model, settings.targets, list(linear), set(stored))
        faults += [
            f"it lacks the matrices of {name}, which its settings name" for name in targeted - stored.keys()
        ]
        faults += [f"its settings do not name {name}" for name in stored.keys() - targeted]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            "HB325",
            "; ".join(sorted(faults)[:5]) + more,
            where=str(folder),
            fix=f"load it on the model it was made for, {settings.base}; "
            f"this is {model.name_or_path or type(model).__name__}",
        )


def _targeted(
    model: PreTrainedModel, targets: str | list[str], linear: list[str], stored: set[str]
) -> set[str]:
    """The linear layers that the settings name: by `all-linear` or a list of names.

    A pattern is taken to mean what is stored: matching a stranger's regular expression can run for ever.
    """
    if targets == ALL_LINEAR:
        return set(target_names(model, LoraSpec()))
    if isinstance(targets, str):
        return stored
    return {name for name in linear if any(matches(name, target) for target in targets)}


def _values(tensor: StoredTensor) -> Tensor:
    values = tensor.read()
    if not values.is_floating_point() or not torch.isfinite(values).all():
        raise ModelError(
            "HB311",
            f"{tensor.name} holds values that are not finite numbers",
            where=str(tensor.file),
            fix="train the adapter again; its training has failed",
        )
    return values
