"""The shipped base is small, loads like any model folder, and its tokenizer loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.model.loading import load
from halfbyte.quant.weight import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_base" / "model"
LIMIT_BYTES = 6_000_000


def test_the_model_folder_is_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= LIMIT_BYTES


def test_it_loads_in_transformers_and_in_4_bits():
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ours = load(MODEL, quantization=None, dtype=torch.float32)
    plain.set_attn_implementation(ours.config._attn_implementation)
    assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    in_4_bits = load(MODEL, quantization=QuantSpec(), dtype=torch.float32)
    assert torch.isfinite(in_4_bits(input_ids=ids).logits).all()


@pytest.mark.parametrize("text", ["Three boxes of tea, 27 €\n\tto Łódź!", "日本語 🙂", "  two  spaces"])
def test_its_tokenizer_gives_back_every_text(text):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_the_generators_give_the_same_text_from_the_same_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.tiny_base.corpus import documents

    first, again, other = documents(3), documents(3), documents(4)
    texts = [next(first) for _ in range(50)]
    assert texts == [next(again) for _ in range(50)]
    assert texts != [next(other) for _ in range(50)]
    assert not any("quantity:" in text and "item:" in text for text in texts)  # not the demo's records
