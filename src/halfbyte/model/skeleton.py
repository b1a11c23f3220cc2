"""An empty transformers model: every module in place, its weights without memory, its computed buffers real.

It owns the choice of the model class and what that class wants filled; it must not know tensors or 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from halfbyte.errors import ModelError
from halfbyte.model import attention
from halfbyte.model.blocks import use_blocks
from halfbyte.model.files import ModelFolder
from halfbyte.model.linear4bit import is_linear
from halfbyte.model.purpose import Head, compute_precisely, head_modules, purpose_of
from halfbyte.model.seq2seq import is_encoder_decoder, untie_own_head


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor a model wants from its weights.

    Attributes:
        names: Every name it has in the model; more than one where weights are tied.
        shape: Its sizes.
        dtype: What it is to be held in, unless it is quantised.
        is_parameter: Whether it is a parameter, or a buffer.
        is_meta: Whether it has no values yet.
        linear: The linear layer whose weight it is and which may be replaced by one of 4 bits; else None.
        is_embedding: Whether it is the weight of an embedding or of the output head.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    is_meta: bool
    linear: nn.Module | None
    is_embedding: bool


_RANDOM = (Tensor.normal_, Tensor.uniform_)


class _EmptyWithoutMemory(TorchFunctionMode):
    """Sends `torch.empty` to the meta device: that is how modules make the weights that a file will fill.

    Whatever is computed (rotary frequencies, masks, ones of a norm) is made for real, so that buffers which
    are in no file are right.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _RANDOM and args[0].is_meta:
            return args[0]  # to find that out itself takes torch a third of the time for the whole model
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_skeleton(folder: ModelFolder, dtype: torch.dtype, head: Head | None = None) -> PreTrainedModel:
    """Build the model a folder describes, with weights that take no memory.

    Args:
        folder: The checked folder.
        dtype: The model's dtype; a head on an encoder is in float32.
        head: What stands on the encoder; None for a model that writes: a causal one, or an encoder-decoder.

    Returns:
        The model in evaluation mode, with our attention and fused layers where its family allows that;
        parameters made by `torch.empty` are on the meta device.

    Raises:
        ModelError: HB301 settings that contradict each other, HB312 no model that writes, HB313 unknown
            type, HB350 no encoder.
    """
    config = _model_config(folder)
    if head is None:
        model_class = _model_class(config, folder)
    else:
        model_class = head.model_class(config, str(folder.path / "config.json"))
        head.tell(config)
    try:
        with torch.random.fork_rng(devices=[]), _EmptyWithoutMemory():
            model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    except Exception as fault:  # any of transformers' and torch's own; it is told, with its cause, not hidden
        raise _bad_settings(folder, fault) from fault
    model.config.dtype = dtype  # older transformers leave what the file says
    if head is not None:
        compute_precisely(model)
    if is_encoder_decoder(model):
        untie_own_head(model, folder)
    attention.use(model)
    use_blocks(model)
    model.train(False)
    return model


def _model_config(folder: ModelFolder) -> PretrainedConfig:
    model_type = folder.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            "HB313",
            f"model_type is {model_type!r}, which this version of transformers does not know",
            where=str(folder.path / "config.json"),
            fix="install a newer transformers, or use a model of a type it knows",
        )
    try:
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as fault:  # as above
        raise _bad_settings(folder, fault) from fault
    assert isinstance(config, PretrainedConfig)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says how the file is stored, not what this model is
    return config


def _model_class(config: PretrainedConfig, folder: ModelFolder) -> Any:
    """The class transformers has for this type, if the weights were saved from that class."""
    two = config.is_encoder_decoder
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if two else MODEL_FOR_CAUSAL_LM_MAPPING
    found: Any = mapping.get(type(config), None)
    classes: tuple[Any, ...] = found if isinstance(found, tuple) else (found,) if found else ()
    saved_from = config.architectures or [known.__name__ for known in classes]
    for known in classes:
        if known.__name__ in saved_from:
            return known
    expected = " or ".join(known.__name__ for known in classes) or "a model with a language-modelling head"
    raise ModelError(
        "HB312",
        f"its weights are those of {', '.join(saved_from) or config.model_type}, expected {expected}",
        where=str(folder.path / "config.json"),
        fix="use a model that generates text: its architectures end in ForCausalLM, LMHeadModel or "
        "ForConditionalGeneration",
    )


def _bad_settings(folder: ModelFolder, fault: Exception) -> ModelError:
    return ModelError(
        "HB301",
        f"no model can be built from its settings: {type(fault).__name__}: {fault}",
        where=str(folder.path / "config.json"),
        fix="correct config.json, or fetch it again",
    )


def slots(model: PreTrainedModel) -> list[Slot]:
    """Every parameter and every saved buffer of a skeleton, each once however many names it has."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _saved_tensors(model):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    precise = cache(partial(_kept_precise, model))
    return [_slot(model, head, tuple(names[key]), tensor, precise) for key, tensor in tensors.items()]


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _slot(
    model: PreTrainedModel,
    head: object,
    names: tuple[str, ...],
    tensor: Tensor,
    precise: Callable[[torch.dtype | None], set[str]],
) -> Slot:
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    is_embedding = any(isinstance(owner, nn.Embedding) or owner is head for owner in owners)
    is_weight = len(names) == 1 and names[0].endswith(".weight") and is_linear(owners[0])
    linear = owners[0] if is_weight and not is_embedding and not _matches(names[0], precise(None)) else None
    kept = tensor.is_floating_point() and any(_matches(name, precise(tensor.dtype)) for name in names)
    return Slot(
        names=names,
        shape=tuple(tensor.shape),
        dtype=torch.float32 if kept else tensor.dtype,
        is_parameter=isinstance(tensor, nn.Parameter),
        is_meta=tensor.is_meta,
        linear=linear,
        is_embedding=is_embedding,
    )


def _kept_precise(model: PreTrainedModel, dtype: torch.dtype | None) -> set[str]:
    """Names of the parts that are in float32 when the model is in `dtype`, by transformers or as heads; None: any."""
    always: set[str] = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if purpose_of(model) != "generate":
        always |= set(head_modules(model))
    in_float16: set[str] = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, None):
        return always | in_float16
    return always if dtype == torch.bfloat16 else set()


def _matches(name: str, parts: set[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)
