"""Promise of loading: the 16-bit model never exists, measured from outside in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from halfbyte.kernels import native

MEASURE = Path(__file__).with_name("measure_loading.py")

# The promise: beyond the 4-bit model itself, twice the largest tensor.
LARGEST_TENSORS = 2

# A process whose model is smaller than this share of the folder cannot have kept the folder's 16-bit tensors.
SMALLER_THAN_DISK = 0.5


def write_sharded_llama(folder: Path, config: LlamaConfig) -> int:
    """Write random bfloat16 weights, one shard per layer; returns the bytes of the largest tensor."""
    D, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layer: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj": (D, D) for p in "qkvo"}
    layer |= {"mlp.gate_proj": (I, D), "mlp.up_proj": (I, D), "mlp.down_proj": (D, I)}
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (D,))
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    ]
    for i in range(config.num_hidden_layers):
        shards.append({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    weight_map: dict[str, str] = {}
    largest = 0
    folder.mkdir()
    for number, shapes in enumerate(shards):
        tensors = {n: torch.empty(s, dtype=torch.bfloat16).normal_(std=0.02) for n, s in shapes.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        largest = max(largest, *(tensor.nbytes for tensor in tensors.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return largest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.skipif(native.module() is None, reason="the reference kernels make whole matrices in float32")
def test_loading_never_holds_more_than_the_4bit_model_and_two_tensors(tmp_path: Path) -> None:
    tiny = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, vocab_size=8
    )
    write_sharded_llama(tmp_path / "tiny", tiny)
    large = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        num_hidden_layers=10,
        vocab_size=16000,
    )
    largest = write_sharded_llama(tmp_path / "large", large)

    command = [sys.executable, str(MEASURE), str(tmp_path / "tiny"), str(tmp_path / "large")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])

    on_disk = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert on_disk > 300e6
    assert got["held"] < SMALLER_THAN_DISK * on_disk
    assert got["beyond"] <= got["held"] + LARGEST_TENSORS * largest, got
