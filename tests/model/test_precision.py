"""Promises of the computing dtype: names mean what they say, and auto is never float16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.model import precision
from halfbyte.model.files import open_model_folder
from halfbyte.model.precision import computing_dtype, stored_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_names_mean_torchs_dtypes(name: str, dtype: torch.dtype) -> None:
    assert computing_dtype(name) == dtype


def test_auto_follows_the_kernels_in_use(isa: str) -> None:
    assert computing_dtype("auto") == (torch.bfloat16 if isa == "avx512_bf16" else torch.float32)


def test_auto_without_native_kernels_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "module", lambda: None)
    assert computing_dtype("auto") == torch.float32


@pytest.mark.parametrize(
    ("model", "dtype"), [("base-11m", torch.bfloat16), ("stories260K-hf", torch.float32)]
)
def test_the_stored_dtype_is_that_of_most_numbers(
    shared: Callable[[str], Path], model: str, dtype: torch.dtype
) -> None:
    assert stored_dtype(open_model_folder(shared(f"models/{model}"))) == dtype
