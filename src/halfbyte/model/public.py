"""The Python interface to models, in plain words: load, add_lora, save_adapter.

It owns friendly defaults and spellings; what they mean lives in the modules it calls, and it must not know
training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.render import Renderer
from halfbyte.model import adapters, fingerprints, loading, lora
from halfbyte.model.lora_spec import ALL_LINEAR, Bias, Init, LoraSpec
from halfbyte.model.precision import computing_dtype
from halfbyte.model.purpose import LABELLED, Head, Purpose, stored_labels
from halfbyte.model.residency import Residency
from halfbyte.quant.weight import QuantSpec
from halfbyte.settings import TemplateName


def load(
    path: str | PathLike[str],
    *,
    quantization: Literal["nf4", "fp4"] | None = None,
    scales: Literal["absmax", "mse"] = "absmax",
    dtype: torch.dtype | str | None = None,
    adapter: str | PathLike[str] | None = None,
    allow_template_mismatch: bool = False,
    task: Purpose = "generate",
    residency: Residency | None = None,
) -> PreTrainedModel:
    """Load a language model, of either kind, or an encoder with what was trained on it, from a local folder.

    Args:
        path: Folder with `config.json` and safetensors, in 16 bits or in bitsandbytes' 4 bits.
        quantization: Hold the linear layers in this 4-bit format; None leaves them as they are stored.
        scales: With `quantization`: each block's scale is its largest magnitude (`absmax`, as bitsandbytes),
            or the one with the least squared error (`mse`).
        dtype: Computing dtype, as torch's or by name; None is bfloat16 where the kernels in use multiply it,
            else float32.
        adapter: Folder of a LoRA adapter in PEFT's format to put on top.
        allow_template_mismatch: Load an adapter even though it was trained with another tokenizer or chat template
            than the folder's.
        task: `generate`; of an encoder `classify`, `tag`, `embed`; of a vision transformer `classify_images`: with
            the adapter's or the folder's head.
        residency: Take the frozen weights from the mapped files: all in memory (`resident`), or layer by layer
            (`streamed`), so that a model larger than memory can be used and tuned. None reads them.

    Returns:
        A transformers model in evaluation mode, frozen where it is in 4 bits or mapped.

    Raises:
        ModelError: With a code for whatever is wrong with the folder or the adapter; HB326 where these were
            trained with other words, HB349 where the adapter was trained on other weights.
    """
    if adapter is not None and not allow_template_mismatch:
        fingerprints.refuse_other_words(Path(adapter), Path(path))
    trained = Path(adapter) if adapter is not None else Path(path)
    labels = stored_labels(trained) if task in LABELLED else ()
    return loading.load(
        Path(path),
        quantization=QuantSpec(format=quantization, scales=scales) if quantization else None,
        dtype=dtype if isinstance(dtype, torch.dtype) else computing_dtype(dtype or "auto"),
        adapter=Path(adapter) if adapter is not None else None,
        head=None if task == "generate" else Head(task, labels),
        residency=residency,
    )


def add_lora(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    target_modules: Literal["all-linear"] | Sequence[str] = ALL_LINEAR,
    rank_stabilised: bool = False,
    init: Init = "default",
    init_iterations: int = 1,
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] = (),
    bias: Bias = "none",
    seed: int = 0,
) -> list[str]:
    """Put a trainable LoRA adapter beside linear layers and freeze everything else.

    Args:
        model: A model from `load`.
        r: Rank.
        alpha: The adapter's output is scaled by alpha / r.
        dropout: Share of the adapter's inputs set to zero while training.
        target_modules: Every linear layer but the output head, or a list of name endings.
        rank_stabilised: Scale by alpha / √r instead.
        init: How the adapter begins: `default` and `gaussian` change nothing yet; `pissa` takes the principal
            directions out of the base, `loftq` what 4 bits lose of it.
        init_iterations: Rounds of quantising and decomposing, for `pissa` and `loftq`.
        dora: Train the length of each row of a weight apart from its direction.
        rank_pattern: Ranks of single layers: name endings, or regular expressions for them, with a rank each.
        alpha_pattern: As `rank_pattern`, for alpha.
        modules_to_save: Name endings of modules that train whole, in float32.
        bias: Which biases of the base train too: `none`, those of adapted layers (`lora_only`), or `all`.
        seed: Decides the first values.

    Returns:
        Names of the adapted modules.

    Raises:
        ModelError: HB320 for targets that match nothing, HB321 for bad values, HB322 for a second adapter,
            HB340 to HB343 and HB348 for what does not fit the model, HB347 when its vocabulary was resized.
    """
    spec = LoraSpec(
        r,
        alpha,
        dropout,
        target_modules,
        rank_stabilised,
        init,
        init_iterations,
        dora,
        rank_pattern or {},
        alpha_pattern or {},
        modules_to_save,
        bias,
    )
    return lora.add_lora(model, spec, seed)


def save_adapter(
    model: PreTrainedModel,
    folder: str | PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    template: TemplateName = "auto",
) -> None:
    """Write the model's adapter in PEFT's format, naming the folder the base was loaded from.

    Args:
        model: A model with an adapter.
        folder: Where to; written whole or not at all.
        tokenizer: What it was trained with: `load` then refuses to put the adapter on a folder with another. None
            leaves that open.
        template: With `tokenizer`: the chat format that it was trained with, as `data.template` names it.

    Raises:
        ModelError: HB322 without an adapter, HB347 when the model's vocabulary was resized, HB316 if the folder
            cannot be written.
    """
    words = None if tokenizer is None else Fingerprint.of(Renderer(tokenizer, template))
    adapters.save_adapter(model, Path(folder), base=str(model.name_or_path), fingerprint=words)
