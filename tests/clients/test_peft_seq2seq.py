"""Promises kept with the real PEFT for encoder-decoders: our adapters answer the same there, and its own here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from tests.model.seq2seq_families import BUILD, write
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

import halfbyte
from halfbyte.model.linear4bit import Linear4bit, dense_weight
from halfbyte.model.lora import LoraLinear, adapted_modules

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Both sides compute the same formula in float32; a wrong scale, order or transposition is off by more than 0.1.
LOGIT_TOLERANCE = 1e-4
KINDS = tuple(BUILD)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    torch.set_num_threads(1)
    return lambda kind: write(tmp_path / kind, kind)


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    read, written = (torch.randint(4, 60, (3, n), generator=draw) for n in (11, 6))
    mask = torch.arange(11)[None] < torch.tensor([11, 7, 2])[:, None]
    with torch.no_grad():
        out: torch.Tensor = model(
            input_ids=read, attention_mask=mask.long(), decoder_input_ids=written
        ).logits
    return out


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_and_transformers_load_our_adapter_and_answer_the_same(
    folder: Callable[[str], Path], tmp_path: Path, kind: str, quantization: str | None
) -> None:
    base = folder(kind)
    model = halfbyte.load(base, quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    halfbyte.add_lora(model, r=4, alpha=12)
    bare = logits(model)
    for layer in adapted_modules(model).values():
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    halfbyte.save_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_2_SEQ_LM"

    plain = reference(base)
    for name, module in model.named_modules():  # the base as it is in 4 bits, in plain float32
        held = module.base if isinstance(module, LoraLinear) else None
        if isinstance(held, Linear4bit):
            plain.get_submodule(name).weight.data.copy_(dense_weight(held))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    assert isinstance(theirs, peft.PeftModelForSeq2SeqLM)
    assert (logits(theirs) - logits(model)).abs().max() <= LOGIT_TOLERANCE
    assert (logits(theirs) - bare).abs().max() > 1000 * LOGIT_TOLERANCE, "the adapter does nothing"

    again = halfbyte.load(base, quantization=quantization, dtype="float32", adapter=tmp_path / "adapter")  # type: ignore[arg-type]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_an_adapter_that_peft_made_and_answer_the_same(
    folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = folder(kind)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(reference(base), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    model = halfbyte.load(base, dtype="float32", adapter=tmp_path / "adapter")
    assert (logits(theirs) - logits(model)).abs().max() <= LOGIT_TOLERANCE
    assert (logits(model) - logits(reference(base))).abs().max() > 1000 * LOGIT_TOLERANCE
