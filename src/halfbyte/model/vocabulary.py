"""A model's vocabulary and its folder's: an adapter is for the tokens of the folder that others load.

It owns what is said of a model whose embedding was resized after loading; it must not know tokenizers or files of
adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.files import read_json
from halfbyte.model.limits import Limits

FIX = (
    "resize the 16-bit model in transformers, save it with its tokenizer as a folder, and tune that; "
    "lora.modules_to_save: [embed_tokens, lm_head] trains the new tokens"
)


def refuse_resized(model: PreTrainedModel) -> None:
    """Refuse a model that has other tokens than the folder it came from, which is what an adapter is loaded on.

    Its new rows are random, in no file, and not in the adapter.

    Args:
        model: With adapters or without. One whose folder is gone, or names no vocabulary, passes.

    Raises:
        ModelError: HB347 when the numbers of tokens differ.
    """
    file = Path(model.name_or_path or "") / "config.json"
    if not model.name_or_path or not file.is_file():
        return
    config: dict[str, Any] = read_json(file)
    text = config.get("text_config")
    stored = (text if isinstance(text, dict) else config).get("vocab_size")
    if not isinstance(stored, int):
        return
    if (held := Limits.of(model).vocabulary) != stored:
        raise ModelError(
            "HB347", f"the model has {held:,} tokens, its folder {stored:,}", where=str(file.parent), fix=FIX
        )


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the module whose rows are the tokens that the model reads."""
    embedding: object = model.get_input_embeddings()
    return next(str(name) for name, module in model.named_modules() if module is embedding)
