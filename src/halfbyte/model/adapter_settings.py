"""The settings of an adapter in PEFT's format: which are written, which are understood, which are refused.

It owns `adapter_config.json`; it must not know modules or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ModelError
from halfbyte.model.files import PICKLED, contained, read_json
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.model.purpose import SEQ2SEQ, TASK_TYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

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
    (
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    )
)
# What these settings may be; others of the same name change the base or add what is not in the file.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": (*TASK_TYPES.values(), SEQ2SEQ, None),
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "use_rslora": (True, False),
    "use_dora": (True, False),
}


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What was understood of an `adapter_config.json`.

    Attributes:
        spec: Ranks, scales, patterns and modules that train whole.
        targets: Which layers are adapted: names, `all-linear`, or a pattern.
        base: The model it was made for.
        task_type: PEFT's name of what that model is for; None where it is not said.
    """

    spec: LoraSpec
    targets: str | list[str]
    base: str
    task_type: str | None = None


def read_settings(folder: Path) -> AdapterSettings:
    """Read `adapter_config.json`: every key is understood, or says nothing, or is refused.

    Raises:
        ModelError: HB301 no JSON, HB303 pickled weights, HB305 outside the folder, HB321 out of range, HB323
            unreadable, HB324 a feature that is not supported.
    """
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


def _settings(file: Path, config: Mapping[str, Any]) -> AdapterSettings:
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
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    faults += [
        f"{name} is {value!r}, expected names with numbers"
        for name, value, kinds in (
            ("rank_pattern", ranks, (int,)),
            ("alpha_pattern", alphas, (int, float)),
        )
        if not isinstance(value, dict) or any(type(number) not in kinds for number in value.values())
    ]
    saved: Any = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(type(name) is str for name in saved):
        faults.append(f"modules_to_save is {saved!r}, expected names")
    if faults:
        raise ModelError("HB323", "; ".join(faults), where=str(file), fix="save the adapter again")
    spec = LoraSpec(
        r,
        alpha,
        dropout,
        rank_stabilised=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        modules_to_save=tuple(saved),
        bias=config.get("bias", "none"),
    )
    return AdapterSettings(spec, targets, str(config.get("base_model_name_or_path")), config.get("task_type"))
