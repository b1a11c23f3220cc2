"""Promises kept with the real transformers and PEFT: a model that they load in our 4 bits is one of theirs."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import halfbyte
from halfbyte.errors import HalfbyteError, KernelError, ModelError
from halfbyte.model import blocks, hf_quantizer
from halfbyte.model.linear4bit import Linear4bit, dense_weight
from halfbyte.model.loading import place_quantised

Shared = Callable[[str], Path]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")

# Both sides compute in float32 what is the same formula; a wrong scale, order or transposition is off by more than 1.
LOGIT_TOLERANCE = 1e-4
# Gradients of up to six layers in float32, relative to the largest of a matrix.
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def theirs(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """The folder as transformers loads it with our configuration."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=halfbyte.HalfbyteConfig(**settings), dtype=dtype
    )
    return model


def tokens(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(tokens(model)).logits
    return out


def adapted(model: PreTrainedModel, **settings: Any) -> Any:
    """PEFT's adapter on a model, the same each time, and not one that changes nothing."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    wrapped = peft.get_peft_model(model, config)
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.1)
    return wrapped


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with each decoder layer that runs as one fused node."""
    calls: list[int] = []
    run = blocks.run_layer

    def counting(*given: Any) -> torch.Tensor:
        calls.append(1)
        return run(*given)

    monkeypatch.setattr(blocks, "run_layer", counting)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"quantization": "fp4", "scales": "mse"}], ids=["plain", "other"])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_it_is_the_model_that_load_makes(
    shared: Shared, name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    ours = halfbyte.load(shared(name), **{"quantization": "nf4", **settings}, dtype=dtype)
    their = theirs(shared(name), dtype, **settings)
    mine, yours = ours.state_dict(), their.state_dict()
    assert mine.keys() == yours.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == yours[key].dtype
        assert torch.equal(tensor, yours[key]), key
    assert any(isinstance(module, Linear4bit) for module in their.modules())
    assert blocks.describe(their) == blocks.describe(ours)
    assert torch.equal(logits(their), logits(ours))


def test_what_a_file_holds_in_float32_is_not_rounded_before_it_is_quantised(shared: Shared) -> None:
    folder = shared("models/stories260K-hf")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.float32}
    name = "model.layers.0.self_attn.q_proj"
    right = halfbyte.load(folder, quantization="nf4", dtype="bfloat16").get_submodule(name)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).get_submodule(name)
    got: Any = theirs(folder, torch.bfloat16).get_submodule(name)
    assert torch.equal(got.codes, right.codes)
    assert torch.equal(got.scales, right.scales)
    wrong = Linear4bit(right.quantised_weight)
    wrong.hold(rounded.weight.detach())
    assert not (
        torch.equal(wrong.codes, right.codes) and torch.equal(wrong.nested_scales, right.nested_scales)
    )


def test_one_dense_weight_is_held_at_a_time(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[weakref.ref[torch.Tensor]] = []

    def watched(model: Any, slot: Any, tensor: torch.Tensor, spec: Any) -> None:
        assert all(earlier() is None for earlier in before)
        dense = [m for m in model.model.modules() if type(m) is torch.nn.Linear]
        assert all(module.weight.is_meta for module in dense)
        before.append(weakref.ref(tensor))
        place_quantised(model, slot, tensor, spec)

    monkeypatch.setattr(hf_quantizer, "place_quantised", watched)
    theirs(shared("models/base-11m"))
    assert len(before) == 42


def test_a_saved_model_is_in_the_form_of_bitsandbytes_and_loads_everywhere(
    shared: Shared, tmp_path: Path
) -> None:
    model = theirs(shared("models/base-11m"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert stored["quantization_config"]["quant_method"] == "bitsandbytes"
    assert torch.equal(logits(halfbyte.load(tmp_path / "saved", dtype="float32")), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(again.model.layers[0].self_attn.q_proj).__module__.startswith("bitsandbytes")
    for module in again.modules():
        module.support_avx512bf16_for_cpu = (
            False  # where it can, it would multiply in bfloat16 whatever is asked
        )
    assert (logits(again) - expected).abs().max() <= LOGIT_TOLERANCE


def test_a_base_is_not_saved_with_an_adapter_in_it(shared: Shared, tmp_path: Path) -> None:
    model = theirs(shared("models/stories260K-hf"))
    wrapped = adapted(model)
    with pytest.raises(ModelError, match="HB322 .*the base is to be saved"):
        model.save_pretrained(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors: tensors[WEIGHT].view(-1)[5:6].fill_(float("nan")), "HB311"),
        (lambda tensors: tensors.pop(WEIGHT), "HB308"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:-1].clone()}), "HB310"),
    ],
    ids=["not a number", "missing", "of another shape"],
)
def test_a_bad_weight_is_refused(
    shared: Shared, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], code: str
) -> None:
    folder = damaged(shared("models/stories260K-hf"), tmp_path / "bad", change)
    with pytest.raises(ModelError, match=f"{code} .*{re.escape(WEIGHT)}"):
        theirs(folder)


def test_what_the_configuration_cannot_mean_is_refused(shared: Shared) -> None:
    with pytest.raises(KernelError, match="HB402 .*nf3"):
        halfbyte.HalfbyteConfig(quantization="nf3")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="HB346 .*cuda"):
        AutoModelForCausalLM.from_pretrained(
            shared("models/stories260K-hf"),
            quantization_config=halfbyte.HalfbyteConfig(),
            device_map={"": "cuda:0"},
        )


def test_the_configuration_may_be_plain_values(shared: Shared) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        shared("models/stories260K-hf"),
        quantization_config={"quant_method": "halfbyte", "quantization": "fp4"},
        device_map="cpu",
    )
    assert {m.quantization.format for m in model.modules() if isinstance(m, Linear4bit)} == {"fp4"}


@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_attention_that_is_asked_for_is_the_one_in_use(shared: Shared, asked: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        shared("models/stories260K-hf"),
        quantization_config=halfbyte.HalfbyteConfig(),
        attn_implementation=asked,
    )
    assert model.config._attn_implementation == asked


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_adapters_of_peft_train_in_fused_layers_as_in_plain_ones(
    shared: Shared, fused: list[int], monkeypatch: pytest.MonkeyPatch, name: str, checkpointing: bool
) -> None:
    def gradients(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
        model = adapted(theirs(shared(name)), **settings)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.p = 0.0
        ids = tokens(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    ours = gradients({})
    assert fused
    monkeypatch.setattr(blocks, "_why_not_now", lambda *_: "this test")
    seen = len(fused)
    plain = gradients({})
    assert len(fused) == seen
    assert ours.keys() == plain.keys()
    for key, expected in plain.items():
        assert (ours[key] - expected).abs().max() <= GRADIENT_TOLERANCE * expected.abs().max(), key
        assert expected.abs().max() > 0


def test_what_peft_can_do_besides_plain_adapters_is_done_by_peft(shared: Shared, fused: list[int]) -> None:
    """Switched off, frozen, several at once: the same answers as on dense layers of the same weights."""
    folder = shared("models/stories260K-hf")
    model = adapted(theirs(folder))
    dense = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, Linear4bit):
            owner = dense.base_model.model.get_submodule(name)
            owner.weight.data = dense_weight(module)

    def compare() -> int:
        before = len(fused)
        assert (logits(model) - logits(dense)).abs().max() <= LOGIT_TOLERANCE
        return len(fused) - before

    layers = model.config.num_hidden_layers
    assert compare() == 0  # generation's cache is on: the layers' own code
    model.config.use_cache = dense.config.use_cache = False
    assert compare() == layers
    with model.disable_adapter(), dense.disable_adapter():
        off = logits(model)
        assert compare() == layers
    assert (logits(model) - off).abs().max() > 1000 * LOGIT_TOLERANCE
    for each in (model, dense):
        torch.manual_seed(1)
        each.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        each.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert compare() == 0
    for each in (model, dense):
        each.set_adapter("default")
    assert compare() == layers
    assert (logits(model) - both).abs().max() > 10 * LOGIT_TOLERANCE


def test_dropout_of_the_adapter_is_drawn_in_fused_layers(shared: Shared, fused: list[int]) -> None:
    model = adapted(theirs(shared("models/stories260K-hf")), lora_dropout=0.5)
    ids = tokens(model)

    def loss() -> float:
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss.detach())

    model.eval()
    assert loss() == loss()
    model.train()
    assert loss() != loss()
    assert len(fused) == 4 * model.config.num_hidden_layers


def test_an_adapter_that_peft_saved_answers_the_same_through_load(shared: Shared, tmp_path: Path) -> None:
    folder = shared("models/base-11m")
    model = adapted(theirs(folder)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    ours = halfbyte.load(folder, quantization="nf4", dtype="float32", adapter=tmp_path / "adapter")
    assert (logits(ours) - expected).abs().max() <= LOGIT_TOLERANCE
    again = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    # On the plain base it is the adapter of every other tool: its change is the same, the base is not.
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    without = logits(dense)
    with_adapter = logits(peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").eval())
    ours, its = expected - logits(theirs(folder)), with_adapter - without
    assert torch.nn.functional.cosine_similarity(ours.flatten(), its.flatten(), dim=0) > 0.9


def test_weights_that_peft_would_have_to_read_are_refused(shared: Shared) -> None:
    folder = shared("models/stories260K-hf")
    with pytest.raises(HalfbyteError, match="HB345 .*`data` of a weight"):
        adapted(theirs(folder), use_dora=True)
    model = adapted(theirs(folder))
    before = logits(model)
    for safe in (False, True):
        with pytest.raises(HalfbyteError, match="HB345 "):
            model.merge_adapter(safe_merge=safe)
    assert torch.equal(logits(model), before)
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert repr(weight) == "HeldWeight(shape=(64, 64), in 4 bits)"


def test_a_model_prepared_as_peft_recommends_trains(shared: Shared) -> None:
    model = peft.prepare_model_for_kbit_training(
        theirs(shared("models/stories260K-hf"), torch.bfloat16),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.is_gradient_checkpointing
    wrapped = adapted(model).train()
    ids = tokens(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 64)
        assert wrapped.base_model.model.model.layers[0].self_attn.q_proj.base_layer(x).dtype == torch.bfloat16
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
