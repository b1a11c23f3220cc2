"""Vision transformers: the numbers of transformers' own, a head that begins anew, adapters that PEFT loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.model.families import PlainLora, gradients
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging

from halfbyte.data.images.pixels import Preprocessor
from halfbyte.errors import ModelError
from halfbyte.kernels import ops
from halfbyte.model import blocks
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.attention import NAME
from halfbyte.model.blocks import describe, fused_layers, plan_memory
from halfbyte.model.files import open_model_folder
from halfbyte.model.functions import run_layer
from halfbyte.model.keep import kept_bytes
from halfbyte.model.layer import Keep, Surroundings
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, adapted_modules, add_lora
from halfbyte.model.offload import Offload
from halfbyte.model.originals import Originals
from halfbyte.model.purpose import Head, modules_to_train, stored_labels
from halfbyte.model.skeleton import build_skeleton
from halfbyte.model.stored_names import StoredNames
from halfbyte.model.vision import Sight
from halfbyte.quant.weight import QuantSpec

# As in test_blocks: float32 in other orders of summation, relative to the largest number of a tensor.
CLOSE = 2.0**-24 * 2048
LABELS = ("cat", "dog", "horse")
CLASSES = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: number for number, label in enumerate(LABELS)},
}


def save_tiny(folder: Path, family: str = "vit", **changes: Any) -> Path:
    """A random model as a folder; biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TINY, **changes}, architectures=[CLASSES[family]])
    model = AutoModelForImageClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(2))


def head(labels: tuple[str, ...] = LABELS, seed: int | None = 0) -> Head:
    return Head("classify_images", labels, seed)


def loaded(folder: Path, labels: tuple[str, ...] = LABELS, **how: Any) -> PreTrainedModel:
    return load(folder, **{"quantization": QuantSpec(), "dtype": torch.float32, "head": head(labels), **how})


def adapted(
    folder: Path, labels: tuple[str, ...] = LABELS, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """In 4 bits with random adapters and its head trained whole, in training mode."""
    model = loaded(folder, labels, dtype=dtype)
    add_lora(model, LoraSpec(r=4, alpha=6, modules_to_save=tuple(modules_to_train(model))), seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in adapted_modules(model).values():
        module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.2)
    model.get_submodule("classifier").trained.weight.data.mul_(1.5)
    return model.train()


def twin_of(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model in float32 with eager attention, holding the same numbers."""
    twin = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager")
    twin.requires_grad_(False)
    for name, layer in adapted_modules(model).items():
        twin.set_submodule(name, PlainLora(layer))
    trained = model.get_submodule("classifier").trained
    twin.classifier = nn.Linear(trained.in_features, trained.out_features)
    twin.classifier.load_state_dict(trained.state_dict())
    return twin.train()


def loss_of(model: PreTrainedModel) -> Any:
    out = model(pixel_values=images(), labels=torch.tensor([0, 2, 1]))
    out.loss.backward()
    return out


def assert_close(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert got.shape == expected.shape
    off = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert off <= CLOSE, f"{what} is off by {off:.3g}"


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_logits_and_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = adapted(save_tiny(tmp_path, family))
    twin = twin_of(tmp_path, model)
    assert len(fused_layers(model)) == 2, describe(model)
    assert model.config._attn_implementation == NAME
    got, expected = loss_of(model), loss_of(twin)
    assert_close(got.logits, expected.logits, "logits")
    ours, theirs = gradients(model), gradients(twin)
    assert {name.replace(".trained", "") for name in ours} == set(theirs)
    assert len(theirs) == 2 * 2 * 6 + 2
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name.replace(".trained", "")], f"gradient of {name}")


def test_a_layer_that_looks_back_only_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(save_tiny(tmp_path))
    right = loss_of(model).logits
    for layer in fused_layers(model):
        layer.attention.is_causal = True
    assert [kind.why for kind in describe(model)] == ["its attention is causal"]
    monkeypatch.setattr("halfbyte.model.passes.attention_forward", _causal)
    for layer in fused_layers(model):
        layer.attention.is_causal = False
    assert not torch.allclose(loss_of(model).logits, right, atol=1e-3)


def _causal(*args: Any, causal: bool, **how: Any) -> Any:
    from halfbyte.kernels.attention import attention_forward

    return attention_forward(*args, causal=True, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_kept_the_gradients_are_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(save_tiny(tmp_path), dtype=dtype)
    found, offload = [], Offload(tmp_path, 0)
    for keep in (each for each in Keep if each is not Keep.EIGHT_BIT):
        for layer in fused_layers(model):
            layer.keep, layer.offload = keep, offload
        loss_of(model)
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
        model.zero_grad(set_to_none=True)
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_bytes_that_are_kept_are_as_many_as_counted(tmp_path: Path) -> None:
    from halfbyte.model.blocks import _known_family, _layer
    from halfbyte.model.documents import whole_rows

    model = adapted(save_tiny(tmp_path))
    x = torch.randn(3, 17, 64)
    module = fused_layers(model)[0]
    layer = _layer(module, _known_family(module))
    around = Surroundings(whole_rows(3, 17), None, None)
    for keep in Keep:
        node = run_layer(layer, x, around, keep, Offload(tmp_path, 0)).grad_fn
        assert node is not None
        held = sum(t.nbytes for t in node.saved_tensors)  # type: ignore[attr-defined]
        assert held == kept_bytes(layer, 3 * 17, 4, keep)
    plan = plan_memory(model, 3 * 17, 10**9)
    assert plan is not None
    assert plan.fits


def test_patches_stay_in_16_bits_and_everything_linear_is_in_4(tmp_path: Path) -> None:
    model = loaded(save_tiny(tmp_path), dtype=torch.bfloat16)
    assert model.vit.embeddings.patch_embeddings.projection.weight.dtype == torch.bfloat16
    linear = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(linear) == 2 * 6
    assert model.classifier.weight.dtype == torch.float32
    assert torch.isfinite(model(pixel_values=images()).logits).all()


def test_folders_are_read_under_old_names_and_new_ones(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored, (
        "transformers writes new names now"
    )
    oracle = AutoModelForImageClassification.from_pretrained(tmp_path)
    model = loaded(tmp_path, quantization=None)
    own = dict(oracle.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in model.named_parameters())
    names = StoredNames(model)
    for new in own:
        assert names.in_model(new, own) == new
    assert names.in_model("encoder.layer.1.output.dense.bias", own) == "vit.layers.1.mlp.fc2.bias"
    assert names.in_model("vit.pooler.dense.weight", own) == "vit.pooler.dense.weight"


def test_originals_are_found_under_old_names(tmp_path: Path) -> None:
    model = loaded(save_tiny(tmp_path))
    name = "vit.layers.1.mlp.fc1"
    read = Originals(model).source(name, model.get_submodule(name))
    assert read is not None
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read(), stored["vit.encoder.layer.1.intermediate.dense.weight"])


def test_the_head_begins_anew_where_labels_are_others(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(loaded(folder).classifier.weight, stored)
    other = loaded(folder, ("dog", "cat", "horse"))
    assert not torch.equal(other.classifier.weight, stored)
    two = loaded(folder, ("cat", "dog"))
    assert two.classifier.weight.shape == (2, 64)
    assert two.config.num_labels == 2
    assert torch.equal(two.classifier.weight, loaded(folder, ("cat", "dog")).classifier.weight)
    with pytest.raises(ModelError, match="HB351"):
        loaded(folder, head=head(("cat", "dog"), seed=None))


def test_a_folder_without_a_classifier_gets_one(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY)).save_pretrained(tmp_path)
    assert any(name.startswith("pooler") for name in load_file(tmp_path / "model.safetensors"))
    assert loaded(tmp_path).classifier.weight.shape == (3, 64)


# PEFT 0.21 asks transformers by a name that is being replaced; a missing tensor must still fail.
@pytest.mark.filterwarnings("default:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", ["vit", "deit"])
def test_an_adapter_gives_in_peft_the_logits_it_gives_here(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", family)
    labels = ("left", "right")
    model = adapted(folder, labels).eval()
    save_adapter(model, tmp_path / "adapter", str(folder))
    assert stored_labels(tmp_path / "adapter") == labels
    with torch.no_grad():
        expected = model(pixel_values=images()).logits
        names = json.loads((tmp_path / "adapter" / "labels.json").read_text())["labels"]
        named = {"id2label": dict(enumerate(names))}
        twin = AutoModelForImageClassification.from_pretrained(folder, **named, ignore_mismatched_sizes=True)
        for name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                weight = ops.dequantize_4bit(module.quantised_weight, torch.float32)
                twin.get_submodule(name.removesuffix(".base")).weight.copy_(weight)
        peft = PeftModel.from_pretrained(twin, tmp_path / "adapter").eval()
        assert_close(peft(pixel_values=images()).logits, expected, "PEFT's logits")
        again = loaded(folder, head=head(labels, seed=None), adapter=tmp_path / "adapter")
        assert torch.equal(again(pixel_values=images()).logits, expected)
        assert not torch.allclose(loaded(folder, labels)(pixel_values=images()).logits, expected, atol=1e-3)


def test_an_adapter_for_other_labels_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    save_adapter(adapted(folder, ("left", "right")), tmp_path / "adapter", str(folder))
    with pytest.raises(ModelError, match="HB325"):
        load_adapter(loaded(folder), tmp_path / "adapter")


def test_a_model_that_sees_no_images_is_refused(shared: Any) -> None:
    with pytest.raises(ModelError, match=r"HB360(?s:.*)llama, expected one of vit, deit"):
        loaded(shared("models/stories260K-hf"))


@pytest.mark.parametrize(("family", "more"), [("vit", 1), ("deit", 2)])
def test_images_of_another_size_are_refused(family: str, more: int, tmp_path: Path) -> None:
    model = build_skeleton(open_model_folder(save_tiny(tmp_path, family)), torch.float32, head(()))
    sight = Sight.of(model)
    assert sight == Sight((28, 28), 1, 16 + more)
    plain = Preprocessor(1, (28, 28), 2, None, 1 / 255, None, None)
    sight.check(plain, tmp_path)
    sight.check(replace(plain, resize=(32, 32), crop=(28, 28)), tmp_path)
    for other, named in (((32, 28), "become 32 x 28 pixels"), (None, "keep a size of their own")):
        with pytest.raises(ModelError, match=rf"HB361.*{named}, the model is shown 28 x 28"):
            sight.check(replace(plain, resize=other), tmp_path)


def test_layers_do_run_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(save_tiny(tmp_path))
    ran = []
    run_layer = blocks.run_layer
    monkeypatch.setattr(blocks, "run_layer", lambda *parts: ran.append(parts) or run_layer(*parts))
    loss_of(model)
    assert len(ran) == 2
    model(pixel_values=images(), attention_mask=torch.ones(3, 1, 17, 17, dtype=torch.bool))
    assert len(ran) == 2, "a mask that is no set of documents is not for the fused layer"


def test_labels_are_compared_by_number_however_the_file_orders_them(tmp_path: Path) -> None:
    labels = tuple(f"class {number}" for number in range(12))
    save_tiny(tmp_path, id2label=dict(enumerate(labels)), label2id=dict(zip(labels, range(12), strict=True)))
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = dict(sorted(config["id2label"].items()))
    assert list(config["id2label"])[:3] == ["0", "1", "10"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert torch.equal(loaded(tmp_path, labels).classifier.weight, stored)
