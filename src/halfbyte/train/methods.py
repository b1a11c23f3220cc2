"""What full, lora and qlora mean: how the base is loaded, what is trained, what is saved.

It owns the differences between the methods; it knows nothing of rows, losses or evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from transformers.utils import logging

from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.adapters import save_adapter
from halfbyte.model.fingerprints import write_fingerprint
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import Progress, load
from halfbyte.model.lora import add_lora
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.model.precision import computing_dtype
from halfbyte.model.purpose import Head, modules_to_train
from halfbyte.model.residency import Residency, streamer_of
from halfbyte.model.saving import whole_folder
from halfbyte.quant.weight import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfbyte.data.fingerprint import Fingerprint
    from halfbyte.settings import Config


def load_base(config: Config, progress: Progress | None = None, head: Head | None = None) -> PreTrainedModel:
    """The base as its method trains it: 4-bit for qlora, the computing dtype for lora, float32 for full.

    A residency that is still `auto` was decided by no forecast, and is resident.

    Args:
        config: Model folder, method, dtype and quantization.
        progress: Told how far reading is, in bytes.
        head: What stands on an encoder; None for a causal language model.

    Raises:
        ModelError: As `model.loading.load`.
    """
    quantization = QuantSpec(**config.quantization.model_dump()) if config.method == "qlora" else None
    dtype = torch.float32 if config.method == "full" else computing_dtype(config.dtype)
    residency: Residency | None = None
    if config.method != "full":
        residency = "resident" if config.residency == "auto" else config.residency
    return load(
        config.model,
        quantization=quantization,
        dtype=dtype,
        progress=progress,
        head=head,
        residency=residency,
    )


def make_trainable(model: PreTrainedModel, config: Config) -> None:
    """Add the adapter and freeze the rest but an encoder's head; for full, every weight stays trainable.

    Raises:
        ModelError: HB320 to HB322 and HB340 to HB343 for adapters that do not fit, HB370 for one that would change a
            base that is streamed.
    """
    if config.method != "full":
        spec = LoraSpec(**config.lora.model_dump())
        if spec.init in ("pissa", "loftq") and streamer_of(model) is not None:
            raise ModelError(
                "HB370",
                f"an adapter that begins as {spec.init} changes the base, whose file stays as it is",
                where="lora.init",
                fix="set lora.init to default, or residency to resident",
            )
        whole = (*spec.modules_to_save, *modules_to_train(model))
        add_lora(model, replace(spec, modules_to_save=whole), config.seed)


def autocast_dtype(config: Config) -> torch.dtype | None:
    """The dtype full training computes in beside its float32 weights, None where that is float32 too.

    Raises:
        ConfigError: HB102 for full training in float16, whose small gradients would vanish unseen.
    """
    dtype = computing_dtype(config.dtype)
    if config.method != "full" or dtype == torch.float32:
        return None
    if dtype == torch.float16:
        raise ConfigError(
            "HB102",
            "method full cannot compute in float16: gradients below 6e-8 become zero",
            where="dtype",
            fix="set dtype to bfloat16, float32 or auto",
        )
    return dtype


def weights_name(config: Config) -> str:
    """How the base is held while it is trained: a 4-bit format, or a dtype."""
    if config.method == "qlora":
        return config.quantization.format
    dtype = torch.float32 if config.method == "full" else computing_dtype(config.dtype)
    return str(dtype).removeprefix("torch.")


def result_name(config: Config) -> str:
    """Name of the folder that holds what was trained: `adapter`, or `model` for full."""
    return "model" if config.method == "full" else "adapter"


class Preparer(Protocol):
    """What makes a model's input of a row, and belongs beside a whole model: a tokenizer, an image processor."""

    def save_pretrained(self, folder: Path, /) -> object:
        """Write its files into a folder."""


def saver(
    model: PreTrainedModel, preparer: Preparer, config: Config, fingerprint: Fingerprint
) -> Callable[[Path], None]:
    """A function that writes what was trained into a folder: an adapter, or for full model and tokenizer."""

    def save(folder: Path) -> None:
        if config.method != "full":
            save_adapter(model, folder, config.model, fingerprint)
            return
        with whole_folder(folder) as work, _without_progress_bar():
            model.save_pretrained(work)
            preparer.save_pretrained(work)
            write_fingerprint(work, fingerprint)

    return save


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its own bar into this run's display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ModelSize:
    """How large a model is.

    Attributes:
        trainable: Numbers that training changes.
        total: All numbers; a weight in 4 bits counts each of its codes.
        nbytes: Bytes all weights take in memory.
        trainable_bytes: Of them, those that training changes.
    """

    trainable: int
    total: int
    nbytes: int
    trainable_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSize:
        """Count a model's numbers; weights that are tied count once."""
        quantised = [m.quantised_weight for m in model.modules() if isinstance(m, Linear4bit)]
        dense = list(model.parameters())
        return cls(
            trainable=sum(p.numel() for p in dense if p.requires_grad),
            total=sum(p.numel() for p in dense) + sum(prod(w.shape) for w in quantised),
            nbytes=sum(p.nbytes for p in dense) + sum(w.nbytes for w in quantised),
            trainable_bytes=sum(p.nbytes for p in dense if p.requires_grad),
        )


def counted_parts(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of the weights by the names of `plan.terms.Memory`; a streamed base, which varies, is left out."""
    size = ModelSize.of(model)
    base = {} if streamer_of(model) else {"base": size.nbytes - size.trainable_bytes}
    return {**base, "adapters": size.trainable_bytes}
