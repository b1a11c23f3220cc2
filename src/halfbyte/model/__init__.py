"""Transformers models with frozen 4-bit weights and LoRA adapters.

It owns loading, the 4-bit layer, LoRA and adapter files; it knows nothing of data or training loops.
"""
