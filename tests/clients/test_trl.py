"""Promises kept with the real TRL: its SFTTrainer trains in our 4 bits after one changed line of the script."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import halfbyte
from halfbyte.model import blocks

Shared = Callable[[str], Path]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

LOSS_TOLERANCE = 2.0**-7
"""Of a step's loss, as a share of it: bfloat16 rounds by at most 2^-9, on both sides, in the forward pass and, by way
of the gradients, in the steps before."""
LOGIT_TOLERANCE = 1e-4
"""As in test_transformers.py: the same formula in float32."""

OURS = halfbyte.HalfbyteConfig()
THEIRS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def script(model_folder: Path, quantization_config: Any, output: Path, **settings: Any) -> list[float]:
    """What users of TRL write; `quantization_config` is the line that differs."""
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16, quantization_config=quantization_config
    )
    rows = Dataset.from_list(
        [
            {"prompt": f"{i} plus {i} is", "completion": f" {2 * i}, as children of {i % 7} years know."}
            for i in range(32)
        ]
    )
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(output), **{**arguments, **settings}),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
        ),
    )
    trainer.train()
    trainer.save_model(str(output))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": False, "packing": True, "max_length": 64}],
    ids=["plain", "packed"],
)
def test_the_script_learns_the_same_as_with_bitsandbytes(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    folder = shared("models/base-11m")
    fused = []
    run = blocks.run_layer
    monkeypatch.setattr(blocks, "run_layer", lambda *given: fused.append(1) or run(*given))
    ours = script(folder, OURS, tmp_path / "ours", **settings)
    assert len(fused) >= 6 * 6, "its layers do not run fused"
    theirs = script(folder, THEIRS, tmp_path / "theirs", **settings)
    assert len(ours) == len(theirs) == 6
    assert ours[-1] < 0.8 * ours[0]
    for mine, its in zip(ours, theirs, strict=True):
        assert abs(mine - its) <= LOSS_TOLERANCE * its
    print(f"losses at most {max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)):.2%} apart")


def test_the_adapter_it_saved_loads_everywhere(shared: Shared, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = shared("models/base-11m")
    script(folder, OURS, tmp_path / "adapter", max_steps=2)
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = model.eval()(ids).logits
        return out

    def base(quantization_config: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantization_config
        )

    by_halfbyte = halfbyte.load(folder, quantization="nf4", dtype="float32", adapter=tmp_path / "adapter")
    by_peft = peft.PeftModel.from_pretrained(base(OURS), tmp_path / "adapter")
    assert (logits(by_halfbyte) - logits(by_peft)).abs().max() <= LOGIT_TOLERANCE
    assert (logits(by_halfbyte) - logits(base(OURS))).abs().max() > 1000 * LOGIT_TOLERANCE
    dense = halfbyte.load(folder, dtype="float32", adapter=tmp_path / "adapter")
    dense_by_peft = peft.PeftModel.from_pretrained(base(None), tmp_path / "adapter")
    assert (logits(dense) - logits(dense_by_peft)).abs().max() <= LOGIT_TOLERANCE
    shutil.rmtree(tmp_path / "adapter")


def test_a_base_without_an_adapter_is_refused_by_the_trainer(shared: Shared, tmp_path: Path) -> None:
    """transformers' own check, which asks the quantiser: nothing would train."""
    model = AutoModelForCausalLM.from_pretrained(shared("models/stories260K-hf"), quantization_config=OURS)
    with pytest.raises(ValueError, match="purely quantized"):
        trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=Dataset.from_list([{"text": "once upon a time"}]),
            processing_class=AutoTokenizer.from_pretrained(shared("models/base-11m")),
        )
