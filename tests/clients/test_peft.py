"""Promises kept with the real PEFT: it answers the same with our adapters as we do, and we with its."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.data.fingerprint import Fingerprint
from halfbyte.model.adapters import load_adapter, save_adapter
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraSpec, adapted_modules, adapters_disabled, add_lora

# PEFT asks transformers by an old name. Its own warnings, such as for keys it misses, stay errors.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

Shared = Callable[[str], Path]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")
TARGETS = {
    "models/base-11m": ["q_proj", "mlp.down_proj"],
    "models/stories260K-hf": ["model.layers.2.self_attn.v_proj", "up_proj"],
    "models/capp-gpt-hf": ["c_attn"],
}

# Both sides compute in float32 what is the same formula; a wrong scale, order or transposition is off by more than 1.
LOGIT_TOLERANCE = 1e-4


def reference(folder: Path) -> PreTrainedModel:
    """The 16-bit base as transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_peft_loads_our_adapter_and_answers_the_same(
    shared: Shared, tmp_path: Path, name: str, stabilised: bool
) -> None:
    folder = shared(name)
    model = load(folder, quantization=None, dtype=torch.float32)
    targets: Any = TARGETS[name] if stabilised else "all-linear"
    names = add_lora(model, LoraSpec(4, 12, 0.1, targets, rank_stabilised=stabilised), seed=0)
    for layer in adapted_modules(model).values():
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter", str(folder), Fingerprint("plain", "aa", "bb"))

    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "adapter").eval()
    their_names = {
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert their_names == set(names)
    assert (logits(theirs) - logits(model)).abs().max() <= LOGIT_TOLERANCE
    with adapters_disabled(model):
        assert (logits(theirs) - logits(model)).abs().max() > 1000 * LOGIT_TOLERANCE, (
            "the adapter does nothing"
        )


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_we_load_an_adapter_that_peft_made_and_answer_the_same(
    shared: Shared, tmp_path: Path, name: str, stabilised: bool
) -> None:
    folder = shared(name)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.1,
        target_modules=TARGETS[name] if stabilised else "all-linear",
        use_rslora=stabilised,
        fan_in_fan_out=name == "models/capp-gpt-hf",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    theirs = peft.get_peft_model(reference(folder), config).eval()
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")

    model = load(folder, quantization=None, dtype=torch.float32)
    load_adapter(model, tmp_path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() <= LOGIT_TOLERANCE
    with adapters_disabled(model):
        assert (logits(theirs) - logits(model)).abs().max() > 1000 * LOGIT_TOLERANCE, (
            "the adapter does nothing"
        )


def test_peft_warns_of_keys_that_are_not_its_own(shared: Shared, tmp_path: Path) -> None:
    """Why the fingerprint has a file of its own: each user of PEFT would be told to upgrade it."""
    folder = shared("models/stories260K-hf")
    model = load(folder, quantization=None, dtype=torch.float32)
    add_lora(model, LoraSpec(2), seed=0)
    save_adapter(model, tmp_path / "adapter", str(folder), Fingerprint("plain", "aa", "bb"))
    settings = tmp_path / "adapter" / "adapter_config.json"
    assert "halfbyte" not in settings.read_text(encoding="utf-8")
    peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    facts = json.loads(settings.read_text(encoding="utf-8")) | {"halfbyte": {"template": "aa"}}
    settings.write_text(json.dumps(facts), encoding="utf-8")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*halfbyte"):
        peft.LoraConfig.from_pretrained(tmp_path / "adapter")
