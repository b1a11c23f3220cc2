"""Promises of the comparison of gradients: it is with the exact one, at one model, and leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.model.families import adapted, save_tiny

from halfbyte.model.blocks import fused_layers
from halfbyte.model.layer import Keep
from halfbyte.train.deviation import MUCH, Deviation, deviation


def taker(model: torch.nn.Module):  # type: ignore[no-untyped-def]
    ids = torch.randint(3, 101, (2, 13), generator=torch.Generator().manual_seed(2))

    def take() -> None:
        assert all(p.any() for p in model.parameters() if p.requires_grad), "no error shows behind zeros"
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return take


def test_only_layers_in_8_bits_are_compared(tmp_path: Path) -> None:
    model = adapted(save_tiny("llama", tmp_path))
    assert deviation(model, taker(model)) is None
    fused_layers(model)[1].keep = Keep.EIGHT_BIT  # type: ignore[assignment]
    found = deviation(model, taker(model))
    assert found is not None
    assert found.layers == 1
    assert 0 < found.relative < MUCH


def test_a_comparison_leaves_no_trace_and_repeats(tmp_path: Path) -> None:
    model = adapted(save_tiny("llama", tmp_path), dropout=0.5)
    for layer in fused_layers(model):
        layer.keep = Keep.EIGHT_BIT  # type: ignore[assignment]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trained.items():
            if name.endswith("lora_B"):
                p.zero_()
    before = {name: p.detach().clone() for name, p in trained.items()}
    torch.manual_seed(1)
    first = deviation(model, taker(model))
    torch.manual_seed(1)
    assert deviation(model, taker(model)) == first
    assert first is not None
    assert first.worst_relative > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in trained.items())
    assert all(layer.keep is Keep.EIGHT_BIT for layer in fused_layers(model))


def test_an_error_between_the_two_leaves_the_layers_and_weights_as_they_were(tmp_path: Path) -> None:
    model = adapted(save_tiny("llama", tmp_path))
    fused_layers(model)[0].keep = Keep.EIGHT_BIT  # type: ignore[assignment]
    empty = next(p for p in model.parameters() if p.requires_grad)
    empty.data.zero_()

    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        deviation(model, fails)
    assert fused_layers(model)[0].keep is Keep.EIGHT_BIT
    assert not empty.any()


@pytest.mark.parametrize("relative", [math.nan, math.inf, MUCH * 1.01])
def test_much_and_no_number_are_told(relative: float) -> None:
    found = Deviation(relative, 0.5, "w", relative, 3)
    assert found.is_much
    assert found.as_dict()["is_much"] is True
    assert found.as_dict()["relative"] == (relative if math.isfinite(relative) else None)
    assert not found._replace(relative=MUCH).is_much
