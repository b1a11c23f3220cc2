"""Promises of trained biases kept with the real PEFT: the same losses, files both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import halfbyte as hb
from halfbyte.errors import ModelError
from halfbyte.model import blocks
from halfbyte.model.lora import adapters_disabled

Shared = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

GPT = "models/capp-gpt-hf"  # biases in every linear layer and norm
LOGIT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
"""Relative, of five steps in float32: the same formulas in another order."""
TARGETS = ["c_attn", "mlp.c_proj"]
KINDS = ("lora_only", "all")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def dense(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def theirs_of(folder: Path, bias: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, bias=bias, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(dense(folder), config)


def ours_of(folder: Path, bias: Any, **loading: Any) -> PreTrainedModel:
    model = hb.load(folder, dtype="float32", **loading)
    hb.add_lora(model, r=4, alpha=8, target_modules=TARGETS, bias=bias)
    return model


def tokens(model: Any) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.eval()(tokens(model)).logits
    return out


def train(model: Any) -> list[float]:
    """Five steps without dropout."""
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    ids, losses = tokens(model), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("bias", KINDS)
def test_losses_are_those_of_peft_and_its_file_loads_here(shared: Shared, tmp_path: Path, bias: str) -> None:
    folder = shared(GPT)
    theirs, ours = theirs_of(folder, bias), ours_of(folder, bias)
    values = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = values[f"base_model.model.{name}.default.weight"].detach().clone()
    count = {
        side: sum(p.numel() for p in m.parameters() if p.requires_grad)
        for side, m in (("a", theirs), ("b", ours))
    }
    assert count["a"] == count["b"]
    without = sum(p.numel() for p in ours_of(folder, "none").parameters() if p.requires_grad)
    assert count["b"] > without
    mine, its = train(ours), train(theirs)
    assert mine == pytest.approx(its, rel=LOSS_TOLERANCE)
    assert mine[-1] < mine[0]
    theirs.save_pretrained(tmp_path / "theirs")
    again = hb.load(folder, dtype="float32", adapter=tmp_path / "theirs")
    assert (logits(again) - logits(theirs)).abs().max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("bias", KINDS)
def test_what_trained_is_saved_and_loads_in_peft(
    shared: Shared, tmp_path: Path, bias: str, quantization: Any
) -> None:
    folder = shared(GPT)
    model = ours_of(folder, bias, quantization=quantization)
    assert {b.why for b in blocks.describe(model)} <= {
        "biases of it train",
        "biases of its projections train",
    }
    before = logits(model)
    train(model)
    changed = [
        p for name, p in model.named_parameters() if name.endswith("bias_change") and p.abs().max() > 1e-3
    ]
    assert changed
    hb.save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    names = {name for name in stored if name.endswith("bias")}
    assert names
    assert {name.endswith(".base_layer.bias") for name in names} == (
        {True, False} if bias == "all" else {True}
    )
    again = hb.load(folder, dtype="float32", quantization=quantization, adapter=tmp_path / "adapter")
    assert (logits(again) - logits(model)).abs().max() <= LOGIT_TOLERANCE
    with adapters_disabled(again):
        assert (logits(again) - before).abs().max() <= LOGIT_TOLERANCE
    plain = hb.load(folder, dtype="float32", adapter=tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(dense(folder), tmp_path / "adapter")
    assert (logits(plain) - logits(theirs)).abs().max() <= LOGIT_TOLERANCE
    for parameter in changed:
        parameter.data.zero_()
    assert (logits(model) - logits(again)).abs().max() > 10 * LOGIT_TOLERANCE


def test_biases_that_cannot_train_are_refused(shared: Shared) -> None:
    config = AutoConfig.for_model(
        "mamba", hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4, intermediate_size=32
    )
    mamba = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"HB348 .*conv1d \(Conv1d\)"):
        hb.add_lora(mamba, target_modules=["in_proj"], bias="all")
    model = hb.load(shared(GPT), dtype="float32")
    with pytest.raises(ModelError, match="HB321 .*modules_to_save"):
        hb.add_lora(model, bias="all", modules_to_save=["ln_f"])
    with pytest.raises(ModelError, match="HB321 .*'some'"):
        hb.add_lora(model, bias="some")  # type: ignore[arg-type]
