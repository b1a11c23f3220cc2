"""Promises of encoders: transformers' own answers in every family, the same packed and padded, whatever is on top."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.encoder_families import FAMILIES, PACKING, PADDING, documents, save_encoder
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    PreTrainedModel,
)

from halfbyte.data.encoder_texts import collate_encoded
from halfbyte.data.pack import Batch
from halfbyte.errors import ModelError
from halfbyte.model import attention
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.encoders import document_logits, hidden_states, token_logits, unpackable
from halfbyte.model.isolation import prove_isolation
from halfbyte.model.limits import Limits
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import adapted_modules, adapters_disabled, add_lora
from halfbyte.model.lora_spec import LoraSpec
from halfbyte.model.originals import Originals
from halfbyte.model.purpose import Head, Purpose, modules_to_train, stored_labels
from halfbyte.quant.weight import QuantSpec

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MINILM = "models/all-MiniLM-L6-v2-fp16"
LABELS = ("negative", "neutral", "positive")
HEADS: dict[Purpose, Head] = {
    "classify": Head("classify", LABELS, seed=3),
    "tag": Head("tag", LABELS, seed=3),
    "embed": Head("embed", seed=3),
}
AUTO: dict[Purpose, Any] = {
    "classify": AutoModelForSequenceClassification,
    "tag": AutoModelForTokenClassification,
    "embed": AutoModel,
}
ANSWERS: dict[Purpose, Callable[[PreTrainedModel, Batch], Tensor]] = {
    "classify": document_logits,
    "tag": token_logits,
    "embed": hidden_states,
}
# The same float32 formula in another order: rounding is of the order of 1e-6, another answer of the order of 1.
TOLERANCE = 1e-4


def loaded(
    folder: Path, purpose: Purpose, quantization: QuantSpec | None = None, **how: Any
) -> PreTrainedModel:
    return load(folder, quantization=quantization, dtype=torch.float32, head=HEADS[purpose], **how)


def adapted(folder: Path, purpose: Purpose, quantization: QuantSpec | None = None) -> PreTrainedModel:
    """A model with an adapter that changes something."""
    model = loaded(folder, purpose, quantization)
    add_lora(model, LoraSpec(r=4, modules_to_save=modules_to_train(model)), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapted_modules(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


def of_documents(answers: Tensor, batch: Batch) -> list[Tensor]:
    """What was answered to each document."""
    if len(answers) == len(batch.documents) and answers.dim() == 2:
        return list(answers)
    return [answers[row, begin:end] for row, begin, end in batch.documents.tolist()]


@pytest.mark.parametrize("purpose", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_stands_on_the_encoder_that_was_stored(
    tmp_path: Path, family: str, purpose: Purpose
) -> None:
    stored = save_encoder(family, tmp_path)
    model = loaded(tmp_path, purpose)
    batch = collate_encoded(
        documents(9, 4, 13), 0 if family not in ("roberta", "xlm-roberta", "mpnet") else 1
    )
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        expected = stored(input_ids=ids, attention_mask=mask)[0]
        found = hidden_states(model, batch)
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=TOLERANCE)
    if purpose != "embed":
        assert model.config.id2label == dict(enumerate(LABELS))
        again = loaded(tmp_path, purpose)
        names = modules_to_train(model)
        assert names
        for name in names:
            mine, other = model.get_submodule(name).state_dict(), again.get_submodule(name).state_dict()
            assert all(torch.equal(mine[part], other[part]) for part in mine)
            assert all(t.dtype == torch.float32 for t in mine.values())
        head = load(tmp_path, quantization=None, dtype=torch.float32, head=Head(purpose, LABELS, seed=4))
        assert not torch.equal(
            head.classifier.state_dict().popitem()[1], model.classifier.state_dict().popitem()[1]
        ) or (not torch.equal(next(head.classifier.parameters()), next(model.classifier.parameters())))


@pytest.mark.parametrize("purpose", HEADS)
@pytest.mark.parametrize("quantization", [None, QuantSpec()], ids=["dense", "nf4"])
@pytest.mark.parametrize("family", PACKING)
def test_documents_give_the_same_packed_padded_and_alone(
    tmp_path: Path, family: str, quantization: QuantSpec | None, purpose: Purpose
) -> None:
    save_encoder(family, tmp_path)
    model = loaded(tmp_path, purpose, quantization)
    rows = documents(9, 1, 13, 4)
    assert unpackable(model) == ""
    prove_isolation(model)
    with torch.no_grad():
        batches = [collate_encoded(rows, None), collate_encoded(rows, 0)]
        packed, padded = (of_documents(ANSWERS[purpose](model, batch), batch) for batch in batches)
        for row, one, other in zip(rows, packed, padded, strict=True):
            single = collate_encoded([row], 0)
            alone = of_documents(ANSWERS[purpose](model, single), single)[0]
            assert torch.allclose(one, other, atol=TOLERANCE)
            assert torch.allclose(one, alone, atol=TOLERANCE)
    assert batches[0].is_packed


@pytest.mark.parametrize("family", PADDING)
def test_families_that_cannot_keep_packed_rows_apart_say_so(tmp_path: Path, family: str) -> None:
    save_encoder(family, tmp_path)
    assert type(loaded(tmp_path, "classify")).__name__ in unpackable(loaded(tmp_path, "classify"))


def test_a_leak_of_an_encoder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder("bert", tmp_path)
    model = loaded(tmp_path, "classify")
    whole = attention.documents_of
    with monkeypatch.context() as patch:
        patch.setattr(attention, "documents_of", lambda B, T, mask, features: whole(B, T, mask, {}))
        with pytest.raises(ModelError, match=r"HB317.*move by"):
            prove_isolation(model)
    with monkeypatch.context() as patch:  # every document is told the class of the first
        patch.setattr(
            "halfbyte.model.isolation.ANSWERS",
            {"classify": (lambda m, b: document_logits(m, b)[:1].expand(len(b.documents), -1),)},
        )
        with pytest.raises(ModelError, match="HB317"):
            prove_isolation(model)
    with monkeypatch.context() as patch:  # positions run on
        patch.setattr(
            Batch,
            "position_ids",
            property(lambda batch: torch.arange(batch.input_ids.shape[1])[None].numpy()),
        )
        with pytest.raises(ModelError, match=r"HB317.*away from"):
            prove_isolation(model)


def test_packed_rows_under_a_mask_with_holes_are_refused(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    model = loaded(tmp_path, "embed")
    layer = model.encoder.layer[0].attention.self
    heads = [torch.randn(1, 4, 6, 8) for _ in range(3)]
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(ModelError, match="HB317"):
        attention.attention(layer, *heads, mask, cu_seq_lens_q=bounds)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_of_weights_keeps_packed_documents_apart(tmp_path: Path, dropout: float) -> None:
    save_encoder("bert", tmp_path)
    model = loaded(tmp_path, "embed")
    layer = model.encoder.layer[0].attention.self
    q, k, v = (torch.randn(1, 4, 11, 8) for _ in range(3))
    bounds = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    plain = attention.attention(layer, q, k, v, None, cu_seq_lens_q=bounds)[0]
    call = attention._Call(q, k, v, None, {"cu_seq_lens_q": bounds, "is_causal": False, "scaling": 8**-0.5})
    assert torch.allclose(call.side_by_side(layer), plain, atol=1e-6)
    torch.manual_seed(0)
    dropped = attention.attention(layer, q, k, v, None, cu_seq_lens_q=bounds, dropout=dropout)[0]
    torch.manual_seed(0)
    changed = v.clone()
    changed[:, :, :3] += 1
    other = attention.attention(layer, q, k, changed, None, cu_seq_lens_q=bounds, dropout=dropout)[0]
    assert not torch.equal(dropped, plain)
    assert torch.equal(dropped[:, 3:], other[:, 3:])
    assert not torch.equal(dropped[:, :3], other[:, :3])


@pytest.mark.parametrize("purpose", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "electra"])
def test_peft_loads_our_adapter_and_answers_the_same(tmp_path: Path, family: str, purpose: Purpose) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_encoder(family, base)
    _same_in_peft(base, folder, purpose)


@pytest.mark.parametrize("purpose", HEADS)
def test_peft_answers_the_same_on_a_real_encoder(
    shared: Callable[[str], Path], tmp_path: Path, purpose: Purpose
) -> None:
    _same_in_peft(shared(MINILM), tmp_path / "adapter", purpose)


def _same_in_peft(base: Path, folder: Path, purpose: Purpose) -> None:
    model = adapted(base, purpose)
    save_adapter(model, folder, base=str(base))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (
        settings["task_type"]
        == {"classify": "SEQ_CLS", "tag": "TOKEN_CLS", "embed": "FEATURE_EXTRACTION"}[purpose]
    )
    labels = {}
    if purpose != "embed":  # as the documentation tells
        labels["id2label"] = dict(enumerate(json.loads((folder / "labels.json").read_text())["labels"]))
    theirs = AUTO[purpose].from_pretrained(base, dtype=torch.float32, **labels).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    batch = collate_encoded(documents(9, 4, 13), 1)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask)[0]
        ours = ANSWERS[purpose](model, batch)
        plain = ANSWERS[purpose](loaded(base, purpose), batch)
    if purpose != "classify":
        expected, ours, plain = (t[mask.bool()] for t in (expected, ours, plain))
    assert torch.allclose(ours, expected, atol=TOLERANCE)
    assert not torch.allclose(ours, plain, atol=0.01)
    if purpose != "embed":
        assert theirs.config.id2label == dict(enumerate(LABELS))
        assert stored_labels(folder) == LABELS
    again = load(
        base,
        quantization=None,
        dtype=torch.float32,
        head=Head(purpose, HEADS[purpose].labels),
        adapter=folder,
    )
    with torch.no_grad():
        back = ANSWERS[purpose](again, batch)
    assert torch.equal(back if purpose == "classify" else back[mask.bool()], ours)


def test_4_bits_hold_the_encoder_and_never_the_head(shared: Callable[[str], Path]) -> None:
    model = adapted(shared(MINILM), "classify", QuantSpec())
    names = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert (
        len(names) == 6 * 6 + 1
    )  # query, key, value, two dense and the output's of each layer, and the pooler
    assert not any("classifier" in name for name in names)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {
        "classifier.trained.weight",
        "classifier.trained.bias",
    }
    with adapters_disabled(model), torch.no_grad():
        answer = document_logits(model, collate_encoded(documents(5), 0))
    assert answer.dtype == torch.float32
    name = "bert.encoder.layer.0.attention.self.query"
    source = Originals(model).source(name, model.get_submodule(f"{name}.base"))
    assert source is not None


@pytest.mark.parametrize("purpose", ["classify", "tag"])
def test_a_head_answers_in_float32_whatever_the_encoder_computes_in(
    shared: Callable[[str], Path], purpose: Purpose
) -> None:
    batch = collate_encoded(documents(5, 8), None)
    plain = load(shared(MINILM), quantization=None, dtype=torch.bfloat16, head=HEADS[purpose])
    with torch.no_grad():
        logits = ANSWERS[purpose](plain, batch)
    assert logits.dtype == plain.classifier.weight.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_an_embedders_pooler_is_left_alone(shared: Callable[[str], Path]) -> None:
    model = adapted(shared(MINILM), "embed")
    assert len(adapted_modules(model)) == 36
    assert not any("pooler" in name for name in adapted_modules(model))


def test_a_stored_head_is_taken_where_it_is_for_these_labels(tmp_path: Path) -> None:
    stored = save_encoder("bert", tmp_path, head=True)
    same = load(tmp_path, quantization=None, dtype=torch.float32, head=Head("classify", ("a", "b", "c")))
    assert torch.equal(same.classifier.weight, stored.classifier.weight)
    other = loaded(tmp_path, "classify")
    assert not torch.equal(other.classifier.weight, stored.classifier.weight)
    assert torch.equal(other.bert.pooler.dense.weight, stored.bert.pooler.dense.weight)
    with pytest.raises(ModelError, match=r"HB351 Head was never trained: classifier is in no file"):
        load(tmp_path, quantization=None, dtype=torch.float32, head=Head("classify", LABELS))
    tagging = load(
        tmp_path, quantization=None, dtype=torch.float32, head=Head("tag", ("a", "b", "c"), seed=0)
    )
    assert not torch.equal(tagging.classifier.weight, stored.classifier.weight)


def test_a_pooler_that_is_not_stored_begins_anew_and_trains_whole(tmp_path: Path) -> None:
    config = save_encoder("bert", tmp_path / "first").config
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", "classify")
    assert modules_to_train(model) == ["classifier", "bert.pooler"]
    quantised = adapted(tmp_path / "base", "classify", QuantSpec())
    save_adapter(quantised, tmp_path / "adapter", base=str(tmp_path / "base"))
    again = load(
        tmp_path / "base",
        quantization=QuantSpec(),
        dtype=torch.float32,
        head=Head("classify", LABELS),
        adapter=tmp_path / "adapter",
    )
    batch = collate_encoded(documents(9, 4), None)
    with torch.no_grad():
        assert torch.equal(document_logits(again, batch), document_logits(quantised, batch))
    assert loaded(tmp_path / "base", "embed") is not None  # reads no pooler


def test_anything_but_the_head_must_be_there(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    without = {n: t for n, t in tensors.items() if n != "encoder.layer.1.output.dense.bias"}
    save_file(without, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"HB308.*encoder\.layer\.1\.output\.dense\.bias"):
        loaded(tmp_path, "classify")
    half = {n: t for n, t in tensors.items() if n != "pooler.dense.bias"}
    save_file(half, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"HB308.*pooler\.dense\.bias"):
        loaded(tmp_path, "classify")
    save_file(tensors | {"encoder.extra": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"HB309.*encoder\.extra"):
        loaded(tmp_path, "classify")


def test_language_models_are_no_encoders(shared: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="HB350 Not an encoder: its model_type is llama"):
        loaded(shared("models/stories260K-hf"), "classify")


def test_an_adapter_for_something_else_is_refused(tmp_path: Path) -> None:
    save_encoder("bert", tmp_path / "base")
    save_adapter(adapted(tmp_path / "base", "tag"), tmp_path / "adapter", base="base")
    with pytest.raises(ModelError, match=r"HB325[\s\S]*it is for TOKEN_CLS, the model is loaded for SEQ_CLS"):
        load_adapter(loaded(tmp_path / "base", "classify"), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"id2label": {"0": "a", "2": "b"}}),
        ("config.json", {"id2label": ["a"]}),
        ("labels.json", {"labels": {"0": "a"}}),
        ("labels.json", {"labels": ["a", 1]}),
        ("labels.json", {}),
    ],
)
def test_labels_that_are_not_numbered_are_refused(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="HB352"):
        stored_labels(tmp_path)


def test_more_than_ten_labels_keep_their_order(tmp_path: Path) -> None:
    names = {str(number): f"label {number}" for number in range(12)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(sorted(names.items()))}))
    assert stored_labels(tmp_path) == tuple(names.values())
    assert stored_labels(tmp_path / "none") == ()


def test_positions_of_roberta_begin_behind_paddings(tmp_path: Path) -> None:
    save_encoder("roberta", tmp_path / "roberta")
    save_encoder("bert", tmp_path / "bert")
    assert Limits.of(loaded(tmp_path / "roberta", "classify")).positions == 62
    assert Limits.of(loaded(tmp_path / "bert", "classify")).positions == 64
