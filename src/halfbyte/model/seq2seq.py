"""Models with an encoder and a decoder: which folders hold one, where answers begin, whose head has its own weight.

It owns what such models are told apart by; it must not know rows, losses or how weights are read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.files import CONFIG, ModelFolder, contained, read_json


def holds_encoder_decoder(folder: Path) -> bool:
    """Whether a folder's `config.json` describes a model with an encoder and a decoder.

    A folder without that file, or of a type that is not known, holds none as far as this can tell.

    Raises:
        ModelError: HB301 or HB305 if the file cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return False
    settings = read_json(contained(folder, CONFIG))
    said = settings.get("is_encoder_decoder")
    if isinstance(said, bool) or settings.get("model_type") not in CONFIG_MAPPING:
        return said is True
    return bool(CONFIG_MAPPING[settings["model_type"]]().is_encoder_decoder)


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model reads with an encoder and writes with a decoder that has a language-modelling head."""
    found = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.get(type(model.config), ())
    return type(model) in (found if isinstance(found, tuple) else (found,))


def decoder_start(folder: Path) -> int:
    """Token id that the decoder is given before an answer's first token.

    Raises:
        ModelError: HB355 if the model's settings name none.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    start = getattr(config, "decoder_start_token_id", None)
    if isinstance(start, int):
        return start
    raise ModelError(
        "HB355",
        f"decoder_start_token_id is {start!r}, expected a token id",
        where=str(folder / CONFIG),
        fix="write the model's own there: T5's is that of its padding, 0",
    )


def refuse_other_end(model: PreTrainedModel, eos: int) -> None:
    """Refuse a model whose own settings end answers by another token than the tokenizer writes: HB356."""
    for settings in (model.generation_config, model.config):
        named = getattr(settings, "eos_token_id", None)
        ends = named if isinstance(named, list) else [named]
        if named is not None and eos not in ends:
            raise ModelError(
                "HB356",
                f"the tokenizer ends answers by token {eos}, eos_token_id is {named}",
                where=str(model.name_or_path),
                fix=f"use the tokenizer the model came with, or set eos_token_id to {eos} in {CONFIG}",
            )


def untie_own_head(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Give the output head a weight of its own where the folder stores another one than the embeddings.

    transformers builds every T5 with one weight for both, whatever `tie_word_embeddings` says, and parts them when it
    finds two.

    Args:
        model: An encoder-decoder, with weights that take no memory.
        folder: Where its weights are stored.

    Source: transformers, `T5Config.__post_init__` and `PreTrainedModel.tie_weights`.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        return
    owners = {f"{name}.weight": module for name, module in model.named_modules()}
    tied = [name for name, owner in owners.items() if getattr(owner, "weight", None) is head.weight]
    own = next(name for name in tied if owners[name] is head)
    others = [name for name in tied if name != own and name in folder.tensors]
    if own not in folder.tensors or not others:
        return
    if not torch.equal(folder.tensors[own].read(), folder.tensors[others[0]].read()):
        head.weight = nn.Parameter(torch.empty_like(head.weight))
        model.all_tied_weights_keys.pop(own, None)
