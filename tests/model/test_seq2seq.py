"""Promises of encoder-decoders: transformers' own loss, rows that do not see each other, heads of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.seq2seq_families import BUILD, t5, write
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

import halfbyte
from halfbyte.data.pack import UNTRAINED, Batch
from halfbyte.data.seq2seq import Seq2SeqExample, collate_seq2seq
from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.model import attention
from halfbyte.model.heads import Objective, head_route, trained_token_losses
from halfbyte.model.inputs import model_inputs
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.lora import adapted_modules
from halfbyte.model.seq2seq import decoder_start, holds_encoder_decoder, refuse_other_end
from halfbyte.train.step import RowNames, accumulate, batch_loss, trained_tokens

KINDS = tuple(BUILD)
# The same float32 products in another order; a missing mask or shift moves a loss by more than 0.01.
LOSS_TOLERANCE = 1e-5
# Entries of at most 1, sums over about 60 trained tokens in another order.
GRADIENT_TOLERANCE = 1e-6
PADDING = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return build


def examples(start: int, count: int = 8, vocabulary: int = 60) -> list[Seq2SeqExample]:
    """Random prompts and answers of unequal lengths."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        source, target = (random.integers(4, vocabulary, n) for n in random.integers(1, 12, 2))
        ids = np.array([start, *target, 1], np.int32)
        source = np.array([*source, 1], np.int32)
        found.append(
            Seq2SeqExample(ids, np.arange(len(ids)) > 0, source, "", str(number), "f:1", truncated=False)
        )
    return found


def batch_of(rows: Sequence[Seq2SeqExample]) -> Batch:
    return collate_seq2seq(rows, PADDING)


def sums(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of each row, (B,)."""
    labels = torch.from_numpy(batch.labels)
    with torch.no_grad():
        nll = trained_token_losses(model, model_inputs(batch, model.device), labels)
    row = (labels != UNTRAINED).nonzero()[:, 0]
    return torch.zeros(len(labels), dtype=torch.float64).index_add(0, row, nll)


@pytest.mark.parametrize("kind", KINDS)
def test_the_padded_loss_is_that_of_transformers_itself(folder: Callable[[str], Path], kind: str) -> None:
    model = halfbyte.load(folder(kind), dtype="float32")
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder(kind), dtype=torch.float32).eval()
    batch = batch_of(examples(decoder_start(folder(kind))))
    ours = batch_loss(model, batch, batch.trained_tokens)
    with torch.no_grad():
        theirs = plain(
            input_ids=torch.from_numpy(batch.source_ids),
            attention_mask=torch.from_numpy(batch.source_mask),
            labels=torch.from_numpy(batch.labels[:, 1:].copy()),  # it shifts them right itself
        ).loss
    assert head_route(model).way == "dense"
    assert abs(ours.cross_entropy.item() - theirs.item()) <= LOSS_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_row_is_what_it_is_alone(folder: Callable[[str], Path], kind: str) -> None:
    model = halfbyte.load(folder(kind), dtype="float32")
    rows = examples(decoder_start(folder(kind)))
    together, alone = sums(model, batch_of(rows)), torch.cat([sums(model, batch_of([row])) for row in rows])
    assert torch.allclose(together, alone, rtol=LOSS_TOLERANCE)
    assert torch.equal(together, sums(model, collate_seq2seq(rows, 7)))  # whatever padding is filled with


@pytest.mark.parametrize("leak", ["attention_mask", "decoder_input_ids"])
def test_a_planted_leak_shows(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    """The comparison above can fail: without the mask, or with answers that are seen ahead, it does."""
    model = halfbyte.load(folder("t5"), dtype="float32")
    rows = examples(0)
    alone = torch.cat([sums(model, batch_of([row])) for row in rows])
    forward = model.forward

    def leaking(**inputs: Any) -> Any:
        if leak == "attention_mask":
            inputs[leak] = torch.ones_like(inputs[leak])
        else:
            inputs[leak] = inputs[leak].roll(1, 0)
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", leaking)
    assert not torch.allclose(sums(model, batch_of(rows)), alone, rtol=100 * LOSS_TOLERANCE)


@pytest.mark.parametrize("objective", [Objective(), Objective(label_smoothing=0.1)])
def test_a_step_does_not_depend_on_how_it_is_cut(folder: Callable[[str], Path], objective: Objective) -> None:
    from halfbyte.train.step import TokenLoss

    rows, found = examples(0), []
    for size in (8, 4, 1):
        model = halfbyte.load(folder("t5"), dtype="float32")
        halfbyte.add_lora(model, r=4)
        torch.manual_seed(3)
        for layer in adapted_modules(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.02)
        micro = [batch_of(rows[i : i + size]) for i in range(0, len(rows), size)]
        divisor = trained_tokens(micro, RowNames())
        for batch in micro:
            accumulate(model, batch, divisor, RowNames(), TokenLoss(objective))
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    whole, *cut = found
    largest = max(float(g.abs().max()) for g in whole if g is not None)
    assert 1e-2 < largest < 1.0
    for gradients in cut:
        for a, b in zip(whole, gradients, strict=True):
            assert a is not None
            assert b is not None
            assert float((a - b).abs().max()) <= GRADIENT_TOLERANCE


def test_label_smoothing_is_that_of_torch(folder: Callable[[str], Path]) -> None:
    model = halfbyte.load(folder("flan"), dtype="float32")
    batch = batch_of(examples(0))
    found = batch_loss(model, batch, batch.trained_tokens, Objective(label_smoothing=0.2))
    with torch.no_grad():
        logits = model(**model_inputs(batch, model.device)).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels[:, 1:]).flatten(), label_smoothing=0.2
    )
    assert abs(found.objective.item() - expected.item()) <= LOSS_TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_head_and_kept_ones_is_in_4_bits_and_adapted(
    folder: Callable[[str], Path], kind: str
) -> None:
    model = halfbyte.load(folder(kind), quantization="nf4", dtype="float32")
    dense = AutoModelForSeq2SeqLM.from_pretrained(folder(kind), dtype=torch.float32)
    linear = {name for name, m in dense.named_modules() if type(m) is torch.nn.Linear and name != "lm_head"}
    in_4_bits = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    kept = {name for name in linear if name.endswith(".wo")}  # as transformers' own quantisers leave it
    assert in_4_bits == linear - kept
    assert bool(kept) == (kind != "bart")
    assert set(halfbyte.add_lora(model, r=2)) == linear


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_t5s_last_product_is_of_the_dtype_that_transformers_keeps_it_in(
    folder: Callable[[str], Path], dtype: str
) -> None:
    """T5 casts what it multiplies to the dtype it finds on the weight; behind an adapter it must find the base's."""
    model = halfbyte.load(folder("flan"), quantization="nf4", dtype=dtype)
    plain = AutoModelForSeq2SeqLM.from_pretrained(folder("flan"), dtype=getattr(torch, dtype))
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    before = model.get_submodule(name).weight.dtype
    assert before == plain.get_submodule(name).weight.dtype
    inputs = model_inputs(batch_of(examples(0)), model.device)
    bare = model(**inputs).logits
    halfbyte.add_lora(model, r=2)
    assert model.get_submodule(name).weight.dtype == before
    assert torch.equal(model(**inputs).logits, bare)


def test_a_head_of_its_own_is_read_whatever_the_settings_say(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    flan = halfbyte.load(folder("flan"), dtype="float32")
    assert not torch.equal(flan.lm_head.weight, flan.shared.weight)
    assert flan.shared.weight is flan.encoder.embed_tokens.weight
    one = halfbyte.load(folder("t5"), dtype="float32")
    assert one.lm_head.weight is one.shared.weight
    flan.save_pretrained(tmp_path)
    again = halfbyte.load(tmp_path, dtype="float32")
    assert torch.equal(again.lm_head.weight, flan.lm_head.weight)
    assert torch.equal(again.shared.weight, flan.shared.weight)


def test_a_last_product_stored_in_4_bits_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Its model would cast what it multiplies with it to bytes."""
    from halfbyte.quant.formats import to_bitsandbytes
    from halfbyte.quant.weight import QuantSpec

    shutil.copytree(folder("t5"), tmp_path, dirs_exist_ok=True)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, name = load_file(file), "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    weight = ops.quantize_4bit(tensors.pop(name), QuantSpec())
    save_file({**tensors, **to_bitsandbytes(name, weight)}, file, metadata={"format": "pt"})
    settings = json.loads(config.read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        halfbyte.load(tmp_path, dtype="float32")
    assert caught.value.code == "HB314"
    assert name in caught.value.what


def test_our_attention_keeps_away_even_where_transformers_would_let_it_in(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no bias by position, and takes queries and keys of one length for those of one text."""
    monkeypatch.setattr(type(t5()), "_supports_attention_backend", True)
    monkeypatch.setattr(attention, "_choices", {})
    model = halfbyte.load(folder("t5"), dtype="float32")
    assert model.config._attn_implementation != attention.NAME
    assert any("another text" in choice.why for choice in attention.choices())


def test_folders_are_told_apart_by_their_settings(folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert holds_encoder_decoder(folder("t5"))
    assert not holds_encoder_decoder(tmp_path)
    for settings, expected in (
        ({"model_type": "t5"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "nobody's"}, False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert holds_encoder_decoder(tmp_path) == expected


def test_a_decoder_without_a_start_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = json.loads((folder("t5") / "config.json").read_text())
    del settings["decoder_start_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as caught:
        decoder_start(tmp_path)
    assert caught.value.code == "HB355"


def test_a_model_that_ends_answers_otherwise_is_refused(folder: Callable[[str], Path]) -> None:
    model = halfbyte.load(folder("t5"), dtype="float32")
    refuse_other_end(model, 1)
    with pytest.raises(ModelError) as caught:
        refuse_other_end(model, 3)
    assert caught.value.code == "HB356"


def test_prompts_longer_than_the_model_s_positions_are_refused(folder: Callable[[str], Path]) -> None:
    from halfbyte.errors import DataError
    from halfbyte.model.limits import Limits

    model = halfbyte.load(folder("bart"), dtype="float32")
    row = examples(1, count=1)[0]
    Limits.of(model).check([row])
    with pytest.raises(DataError) as caught:
        Limits.of(model).check([replace(row, prompt_ids=np.ones(65, np.int32))])
    assert caught.value.code == "HB212"
