"""What a model is loaded for: the class transformers has for it, and the head that may begin anew.

It owns the purposes, their classes, their names in PEFT and which modules are a head; it must not know files or how
weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from halfbyte.errors import ModelError
from halfbyte.model.beside import outside
from halfbyte.model.files import CONFIG, contained, read_json
from halfbyte.model.seq2seq import is_encoder_decoder

Purpose = Literal["generate", "classify", "tag", "embed", "classify_images"]

CLASSES: dict[Purpose, Any] = {
    "generate": MODEL_FOR_CAUSAL_LM_MAPPING,
    "classify": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "tag": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "embed": MODEL_MAPPING,
    "classify_images": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
}
VISION = ("vit", "deit")
"""Types of models that images are shown to."""
TASK_TYPES: dict[Purpose, str | None] = {
    "generate": "CAUSAL_LM",
    "classify": "SEQ_CLS",
    "tag": "TOKEN_CLS",
    "embed": "FEATURE_EXTRACTION",
    "classify_images": None,
}
"""PEFT's names; it has none for images, and loads such adapters as those of any model.

Source: `TaskType` of PEFT.
"""
SEQ2SEQ = "SEQ_2_SEQ_LM"
"""PEFT's name for models that generate with an encoder and a decoder."""
LABELLED: tuple[Purpose, ...] = ("classify", "tag", "classify_images")
"""Purposes whose heads have a class for each label."""
LABELS = "labels.json"
"""Beside an adapter: the names of the classes, in the order of their numbers."""
POOLER = "pooler"

_BEGUN: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class Head:
    """What stands on an encoder.

    Attributes:
        purpose: What the model is for; `embed` has no head.
        labels: Names of the classes, in the order of their numbers; none for `embed`.
        seed: Decides the first values of a head that the folder does not hold; None refuses such a folder.
    """

    purpose: Purpose
    labels: tuple[str, ...] = ()
    seed: int | None = None

    def model_class(self, config: PretrainedConfig, where: str) -> Any:
        """The class transformers has for an encoder of this type with this head.

        Raises:
            ModelError: HB350 for a model that is no encoder, or one without such a class; HB360 for images and a
                model that is not shown any.
        """
        found: Any = CLASSES[self.purpose].get(type(config), None)
        if self.purpose == "classify_images":
            if config.model_type in VISION:
                return found[0] if isinstance(found, tuple) else found
            raise ModelError(
                "HB360",
                f"its model_type is {config.model_type}, expected one of {', '.join(VISION)}",
                where=where,
                fix="use a vision transformer",
            )
        is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
        if is_encoder and not getattr(config, "is_decoder", False) and found is not None:
            return found[0] if isinstance(found, tuple) else found
        raise ModelError(
            "HB350",
            f"its model_type is {config.model_type}, expected one that reads both ways and that transformers knows "
            f"how to {self.purpose} with",
            where=where,
            fix="use an encoder, such as one of BERT's or RoBERTa's family",
        )

    def is_stored(self, settings: Mapping[str, Any], model: PreTrainedModel) -> bool:
        """Whether a folder holds this very head: weights of this class, for these labels.

        Args:
            settings: The folder's `config.json`.
            model: The model that is built from it.
        """
        names = settings.get("id2label")
        numbered = names if isinstance(names, Mapping) else {}
        labels = tuple(str(numbered[key]) for key in sorted(numbered, key=lambda key: (len(key), key)))
        return type(model).__name__ in (settings.get("architectures") or ()) and labels == self.labels

    def tell(self, config: PretrainedConfig) -> None:
        """Write the labels into a model's settings."""
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}
        if self.purpose in ("classify", "classify_images"):
            config.problem_type = "single_label_classification"


def purpose_of(model: PreTrainedModel) -> Purpose:
    """What a model's class is for."""
    if is_encoder_decoder(model):
        return "generate"
    for purpose in ("classify", "tag", "classify_images", "generate"):
        found = CLASSES[purpose].get(type(model.config), ())
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return purpose
    return "embed" if model.base_model is model else "generate"


def task_type(model: PreTrainedModel) -> str | None:
    """PEFT's name of what a model is for."""
    return SEQ2SEQ if is_encoder_decoder(model) else TASK_TYPES[purpose_of(model)]


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of a model's classes, in the order of their numbers."""
    return tuple(name for _, name in sorted((config.id2label or {}).items()))


def stored_labels(folder: Path) -> tuple[str, ...]:
    """The names of the classes that a trained folder was trained for, adapter or model; none where it does not say.

    Raises:
        ModelError: HB301 or HB305 for a file that cannot be read, HB352 for one that does not list its labels.
    """
    name = LABELS if (folder / LABELS).exists() else CONFIG
    if not (folder / name).exists():
        return ()
    file = contained(folder, name)
    found = read_json(file)
    labels = found.get("labels") if name == LABELS else _numbered(found.get("id2label", {}))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ModelError(
            "HB352",
            "expected names of labels, numbered from 0",
            where=str(file),
            fix="save the adapter or model again",
        )
    return tuple(labels)


def _numbered(names: object) -> object:
    """The names of an `id2label` in the order of its numbers, or nothing if these are not 0, 1, 2, ..."""
    if not isinstance(names, Mapping):
        return None
    numbers = [str(number) for number in range(len(names))]
    return [names[number] for number in numbers] if set(numbers) == names.keys() else None


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules with weights that stand outside of a model's encoder."""
    prefix = model.base_model_prefix
    if model.base_model is model:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]


def may_begin(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a folder need not hold: the head, and the encoder's pooler before it."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    pooler = [f"{prefix}{POOLER}"] if getattr(model.base_model, POOLER, None) is not None else []
    return [*head_modules(model), *pooler]


def unread_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose output no answer is made of: an embedder's pooler, whose tokens are pooled."""
    return [POOLER] if purpose_of(model) == "embed" and getattr(model, POOLER, None) is not None else []


def modules_to_train(model: PreTrainedModel) -> list[str]:
    """Names of the modules that train whole beside an adapter: an encoder's head, and a pooler that began anew."""
    if purpose_of(model) == "generate":
        return []
    begun = [name for name in may_begin(model) if model.get_submodule(name) in _BEGUN]
    return [*head_modules(model), *outside(begun, head_modules(model) + unread_modules(model))]


def is_of_another_head(stored: str, prefix: str, names: Iterable[str]) -> bool:
    """Whether a stored tensor lies outside of the encoder, or in its pooler, and so may be left where it is.

    Args:
        stored: Its name.
        prefix: Name of the encoder in models with a head.
        names: Of all tensors of the folder.
    """
    if any(name.startswith(f"{prefix}.") for name in names):
        return not stored.startswith(f"{prefix}.") or stored.startswith(f"{prefix}.{POOLER}.")
    return stored.startswith(f"{POOLER}.")


def begin(model: PreTrainedModel, names: list[str], seed: int) -> None:
    """Give modules without values the first values that their family's code gives them.

    Args:
        model: A model that is filled otherwise.
        names: The modules.
        seed: The same seed gives the same values, whatever happened before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            _BEGUN.add(model.get_submodule(name))
            for part in model.get_submodule(name).to_empty(device="cpu").modules():
                model._init_weights(part)  # type: ignore[no-untyped-call]


def compute_precisely(model: PreTrainedModel) -> None:
    """Hold the head in float32, whatever the encoder computes in."""
    for name in head_modules(model):
        model.get_submodule(name).float().register_forward_pre_hook(_in_float32)


def _in_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
