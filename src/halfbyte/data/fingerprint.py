"""What a model was shown while it was trained, in digests: chat format and tokenizer, to be held against at use.

It owns the digests and the file that carries them beside a model or an adapter; it must not know models, or what
is done about a difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.data.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data.images.pixels import Preprocessor
    from halfbyte.data.render import Renderer

FILE = "halfbyte.json"
PIXELS = "pixels"
"""In place of a chat format's name, where a model is shown images."""
NO_FORMAT = "none"
"""In place of a chat format's name, where texts are given to a model as they are."""


@dataclass(frozen=True)
class Fingerprint:
    """Chat format and tokenizer of a training run.

    Attributes:
        chat_format: Name of the chat format: `tokenizer`, or one of halfbyte's.
        template: SHA-256 of all that the chat format writes: the tokenizer's template, or the named format.
        tokenizer: SHA-256 of what decides ids: vocabulary, merges, added tokens, normaliser, splitting, and
            what is put before each text. Not its files, which differ between versions that read the same.
    """

    chat_format: str
    template: str
    tokenizer: str

    @classmethod
    def of(cls, renderer: Renderer) -> Fingerprint:
        """Of what a renderer writes and its tokenizer.

        Raises:
            DataError: HB209 if the tokenizer has no fast form.
        """
        return cls(
            renderer.template,
            hashlib.sha256(renderer.template_text.encode()).hexdigest(),
            _tokenizer_digest(Encoder(renderer.tokenizer)),
        )

    @classmethod
    def of_texts(cls, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
        """Of a tokenizer whose own special tokens are all that is put around texts.

        Raises:
            DataError: HB209 if the tokenizer has no fast form.
        """
        encoder = Encoder(tokenizer)
        processor = json.loads(tokenizer.backend_tokenizer.to_str()).get("post_processor")
        canonical = json.dumps(_without_unset(processor), sort_keys=True)
        return cls(NO_FORMAT, hashlib.sha256(canonical.encode()).hexdigest(), _tokenizer_digest(encoder))

    @classmethod
    def of_pixels(cls, preprocess: Preprocessor) -> Fingerprint:
        """Of how images are resized, cropped and scaled."""
        return cls(PIXELS, preprocess.digest, "")

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> Fingerprint | None:
        """The fingerprint among the facts of a file, None if there is no whole one."""
        found = facts.get("fingerprint")
        names = [field.name for field in fields(cls)]
        if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
            return None
        return cls(**{name: found[name] for name in names})

    def as_dict(self) -> dict[str, Any]:
        """The facts that `parse` reads back."""
        return {"fingerprint": asdict(self)}

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs in another, in words; nothing if the two are the same."""
        found = []
        if self.chat_format != other.chat_format:
            found.append(f"the chat format is {other.chat_format}, not {self.chat_format}")
        elif self.template != other.template and self.chat_format == PIXELS:
            found.append("images are resized, cropped or scaled in another way")
        elif self.template != other.template:
            found.append(f"the text of the chat format {self.chat_format} is another")
        if self.tokenizer != other.tokenizer:
            found.append("the tokenizer is another")
        return found


def _tokenizer_digest(encoder: Encoder) -> str:
    facts = json.loads(encoder.definition)
    model = facts["model"]
    if isinstance(model.get("merges"), list):  # older libraries wrote each pair as one text
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    decisive = {
        "model": model,
        "added_tokens": facts["added_tokens"],
        "normalizer": facts["normalizer"],
        "pre_tokenizer": facts["pre_tokenizer"],
        "before": np.asarray(encoder.prefix).tolist(),
        "eos": encoder.eos,
    }
    canonical = json.dumps(_without_unset(decisive), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_unset(value: Any) -> Any:
    """Without settings that are off or empty: a newer library lists more of them for the same tokenizer."""
    if isinstance(value, dict):
        kept = {key: _without_unset(part) for key, part in value.items()}
        return {
            key: part for key, part in kept.items() if part is not None and part is not False and part != []
        }
    if isinstance(value, list):
        return [_without_unset(part) for part in value]
    return value
