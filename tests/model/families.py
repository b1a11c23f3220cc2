"""Tiny models of every family whose layers run fused, with random weights and adapters, and their plain twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.kernels import ops
from halfbyte.model.blocks import use_blocks
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.lora import LoraLinear, LoraSpec, adapted_modules, add_lora
from halfbyte.quant.weight import QuantSpec

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA_LIKE},
    "mistral": {**_LLAMA_LIKE, "sliding_window": 7},
    "qwen2": {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 24},
    "gemma": {**_LLAMA_LIKE, "head_dim": 32},
    "gemma2": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "sliding_window": 6,
        "attn_logit_softcapping": None,
        "query_pre_attn_scalar": 20,
    },
    "gemma3_text": {**_LLAMA_LIKE, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20},
    "phi3": {**_LLAMA_LIKE, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 101,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def save_tiny(family: str, folder: Path, **changes: Any) -> Path:
    """A random model of a family as a folder; biases and norms are random too, so that none can be forgotten."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(2)
    model.save_pretrained(folder)
    return folder


def adapted(folder: Path, dtype: torch.dtype = torch.float32, *, dropout: float = 0.0) -> PreTrainedModel:
    """The model in 4 bits with random adapters, its layers fused, in training mode."""
    model = load(folder, quantization=QuantSpec(), dtype=dtype)
    add_lora(model, LoraSpec(r=4, alpha=6, dropout=dropout), seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in adapted_modules(model).values():
        module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator) * 0.2)
    use_blocks(model)
    return model.train()


class PlainLora(nn.Module):
    """The same layer in torch's own words."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        base = layer.base
        assert isinstance(base, Linear4bit)
        self.weight = ops.dequantize_4bit(base.quantised_weight, torch.float32)
        self.bias = base.bias
        self.scale = layer.spec.scale
        self.lora_A = nn.Parameter(layer.lora_A.detach().clone())
        self.lora_B = nn.Parameter(layer.lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))


def plain_twin(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model in float32 with eager attention, holding the same numbers."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    twin.requires_grad_(False)
    for name, layer in adapted_modules(model).items():
        twin.set_submodule(name, PlainLora(layer))
    return twin.train()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the adapters by name."""
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
