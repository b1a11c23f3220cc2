"""The peers' side of bench/step_vs_peers.py: transformers, bitsandbytes' NF4 and PEFT in the shortest loop there is.

It owns the settings of this side, each chosen as what is fastest for it; it must not know what it is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from protocol import Link
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def base(options: dict[str, Any]) -> Any:
    """The model in NF4 with double quantization, of bitsandbytes or, in bench/in_trainer.py, of halfbyte."""
    dtype = getattr(torch, options["dtype"])
    nf4: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    if options.get("quantization") == "halfbyte":
        from halfbyte import HalfbyteConfig

        nf4 = HalfbyteConfig()
    return AutoModelForCausalLM.from_pretrained(
        options["model"], quantization_config=nf4, dtype=dtype, device_map={"": "cpu"}
    )


def lora(options: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=options["r"],
        lora_alpha=options["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def main() -> None:
    link = Link()
    options = link.options
    torch.set_num_threads(options["threads"])
    torch.manual_seed(options["seed"])
    model = base(options)
    model.config.use_cache = False
    if options["checkpointing"]:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    # Adapters in the model's own numbers, as TRL has them on a 4-bit base: 7 % faster than in float32.
    model = get_peft_model(model, lora(options), autocast_adapter_dtype=False)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options["learning_rate"], weight_decay=0.0, fused=True)
    (row,) = json.loads(Path(options["rows"]).read_text(encoding="utf-8"))
    input_ids = torch.tensor([row["input_ids"]])
    labels = torch.where(torch.tensor([row["trained"]]), input_ids, -100)
    link.ready()
    while True:
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        link.done(tokens=input_ids.numel(), trained=int((labels[:, 1:] != -100).sum()), loss=loss.item())


if __name__ == "__main__":
    main()
