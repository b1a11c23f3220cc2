"""Folders of tiny random models with an encoder and a decoder, and of a tokenizer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789:.,?!#'-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of letters and a blank as T5 has it: line ends become blanks, </s> ends every text."""
    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>", "<s>")]
    pieces += [(letter, -3.0) for letter in ("▁", *LETTERS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Replace("\n", " "), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    lead = "<s> " if bos else ""
    specials = [("</s>", 1), ("<s>", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{lead}$A </s>", pair=f"{lead}$A </s> $B </s>", special_tokens=specials
    )
    extra: dict[str, Any] = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **extra
    )


def t5(**changes: Any) -> PreTrainedModel:
    """A small random T5, by default of the first kind: no gate, one weight for embeddings and head."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer()) + 4, **{**T5, **changes})
    return T5ForConditionalGeneration(config).eval()


def flan(**changes: Any) -> PreTrainedModel:
    """The later kind, as Flan-T5 is: gated, and with a head of its own."""
    model = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **changes)
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.all_tied_weights_keys.pop("lm_head.weight", None)
    return model


def mt5() -> PreTrainedModel:
    """A small random mT5: gated, with a class of its own."""
    torch.manual_seed(0)
    config = MT5Config(vocab_size=len(tokenizer()) + 4, **T5)
    return MT5ForConditionalGeneration(config).eval()


def bart() -> PreTrainedModel:
    """A small random BART, whose texts begin with <s> and whose decoder starts from </s>."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer()),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=3,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    return BartForConditionalGeneration(config).eval()


BUILD = {"t5": t5, "flan": flan, "mt5": mt5, "bart": bart}


def write(folder: Path, kind: str = "t5") -> Path:
    """Write such a model with its tokenizer."""
    BUILD[kind]().save_pretrained(folder)
    tokenizer(bos=kind == "bart").save_pretrained(folder)
    return folder
