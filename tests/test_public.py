"""Promises of the Python interface: small, lazy, and the few lines a newcomer types do what they say."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import halfbyte as hb
from halfbyte.errors import ModelError


def test_the_surface_is_what_it_says() -> None:
    assert hb.__all__ == ["HalfbyteConfig", "__version__", "add_lora", "load", "run", "save_adapter"]
    for name in hb.__all__:
        assert getattr(hb, name)
        assert name in dir(hb)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        hb.lode  # noqa: B018


VARIED: dict[str, Any] = {
    "rank_stabilised": True,
    "init": "pissa",
    "init_iterations": 2,
    "dora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"v_proj": 8},
    "modules_to_save": ["lm_head"],
}


@pytest.mark.parametrize("settings", [{}, VARIED], ids=["plain", "every setting"])
def test_the_first_lines_of_a_newcomer_work(
    shared: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    path = shared("models/stories260K-hf")
    model = hb.load(path, quantization="nf4", dtype="float32")
    hb.add_lora(model, r=16, alpha=32, target_modules="all-linear", **settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(1, 33).reshape(2, 16)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    hb.save_adapter(model, tmp_path / "out")
    again = hb.load(path, quantization="nf4", dtype="float32", adapter=tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16"])
def test_dtypes_are_taken_as_torchs_or_by_name(
    shared: Callable[[str], Path], given: torch.dtype | str
) -> None:
    assert hb.load(shared("models/stories260K-hf"), dtype=given).dtype == torch.bfloat16


def test_scales_are_searched_when_asked_for(shared: Callable[[str], Path]) -> None:
    path = shared("models/stories260K-hf")
    dense = hb.load(path, dtype="float32").model.layers[0].self_attn.q_proj.weight.detach()
    x = torch.eye(dense.shape[1])
    errors = {}
    for scales in ("absmax", "mse"):
        layer = (
            hb.load(path, quantization="nf4", scales=scales, dtype="float32").model.layers[0].self_attn.q_proj
        )
        errors[scales] = float((layer(x).T - dense).square().sum())
    assert errors["mse"] < errors["absmax"]


def another_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<note>"])
    tokenizer.save_pretrained(folder)


def another_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_tokenizer, "the tokenizer is another"),
        (another_template, "the text of the chat format tokenizer is another"),
    ],
)
def test_an_adapter_is_not_put_on_a_folder_with_other_words(
    shared: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(shared("models/stories260K-hf"), base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(base)
    shutil.copytree(base, other)
    change(other)
    model = hb.load(base, dtype="float32")
    hb.add_lora(model, r=2)
    hb.save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    hb.load(base, dtype="float32", adapter=tmp_path / "adapter")
    with pytest.raises(ModelError, match=f"HB326 .*{told}"):
        hb.load(other, dtype="float32", adapter=tmp_path / "adapter")
    hb.load(other, dtype="float32", adapter=tmp_path / "adapter", allow_template_mismatch=True)
    hb.save_adapter(model, tmp_path / "unknown")
    hb.load(other, dtype="float32", adapter=tmp_path / "unknown")
    for file in other.glob("*token*"):
        file.unlink()
    hb.load(other, dtype="float32", adapter=tmp_path / "adapter")


def test_an_adapter_is_not_put_on_a_folder_that_cannot_write_its_chat_format(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shared("models/stories260K-hf")
    model = hb.load(base, dtype="float32")
    hb.add_lora(model, r=2)
    chatml = AutoTokenizer.from_pretrained(shared("models/base-11m"))
    hb.save_adapter(model, tmp_path / "adapter", tokenizer=chatml, template="chatml")
    with pytest.raises(ModelError, match="HB326 .*cannot write the chat format"):
        hb.load(base, dtype="float32", adapter=tmp_path / "adapter")
