"""Promises kept with the real transformers + bitsandbytes: they load our 4-bit folders, and we theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from halfbyte.kernels import ops
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.quantising import prepare, quantise_folder
from halfbyte.model.saving import save_quantized
from halfbyte.quant.weight import QuantSpec

Shared = Callable[[str], Path]

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")
SPECS = (QuantSpec(), QuantSpec("fp4", "absmax", False), QuantSpec("nf4", "mse"))

# Both multiply the same float32 matrices in another order: a few units in the last place (2^-24 each) per sum, up
# to six blocks pass that on through two residual additions each, enlarging it by less than four.
LOGIT_TOLERANCE = 2.0**-24 * 12 * 4


@pytest.fixture(autouse=True)
def _quiet_single_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="bitsandbytes|transformers|torch")
        yield


def theirs(folder: Path, spec: QuantSpec | None = None) -> PreTrainedModel:
    """The folder as transformers with bitsandbytes loads it, quantising it if a spec is given."""
    arguments: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if spec is not None:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.format,
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with bfloat16 products it would multiply in bfloat16 whatever dtype is asked for.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = model(ids).logits
    return out


def dense_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The matrix that each 4-bit layer of either side stands for."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[name] = ops.dequantize_4bit(module.quantised_weight)
        elif isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return found


def assert_the_same_model(ours: PreTrainedModel, their: PreTrainedModel) -> None:
    mine, yours = dense_weights(ours), dense_weights(their)
    assert mine.keys() == yours.keys()
    assert mine
    for name, weight in mine.items():
        assert torch.equal(weight, yours[name].to(weight.dtype)), name
    expected = logits(their)
    assert (logits(ours) - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_they_load_our_folder_and_answer_the_same(
    shared: Shared, tmp_path: Path, name: str, spec: QuantSpec
) -> None:
    ours = load(shared(name), quantization=spec, dtype=torch.float32)
    save_quantized(ours, tmp_path / "saved")
    assert_the_same_model(ours, theirs(tmp_path / "saved"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", REAL_MODELS)
def test_they_load_the_folder_we_quantised_without_having_the_model(
    shared: Shared, tmp_path: Path, name: str, spec: QuantSpec
) -> None:
    quantise_folder(prepare(shared(name), spec), tmp_path / "written")
    ours, their = (
        load(tmp_path / "written", quantization=None, dtype=torch.float32),
        theirs(tmp_path / "written"),
    )
    mine, yours = dense_weights(ours), dense_weights(their)  # what was in bfloat16 they multiply so
    assert mine.keys() == yours.keys()
    assert all(torch.equal(weight, yours[key]) for key, weight in mine.items())
    other = dict(their.named_parameters())
    kept = [(key, value) for key, value in ours.named_parameters() if key.rpartition(".")[0] not in mine]
    assert kept
    assert all(torch.equal(value, other[key].float()) for key, value in kept)


def test_they_load_our_folder_of_another_blocksize(shared: Shared, tmp_path: Path) -> None:
    # A model whose widths are multiples of 128: where blocks run on across rows, their AVX-512 decoding is wrong.
    ours = load(shared("models/base-11m"), quantization=QuantSpec(blocksize=128), dtype=torch.float32)
    save_quantized(ours, tmp_path / "saved")
    assert_the_same_model(ours, theirs(tmp_path / "saved"))


@pytest.mark.parametrize("spec", SPECS[:2])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_we_load_their_folder_and_answer_the_same(
    shared: Shared, tmp_path: Path, name: str, spec: QuantSpec
) -> None:
    their = theirs(shared(name), spec)
    their.save_pretrained(tmp_path / "saved")
    for asked in (None, spec):
        assert_the_same_model(load(tmp_path / "saved", quantization=asked, dtype=torch.float32), their)
