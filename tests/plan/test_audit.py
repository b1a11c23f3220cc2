"""An audit's numbers are the loader's, numpy's and bitsandbytes'; a faulty folder is listed, not the end."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.short_runs import Shared

from halfbyte.errors import PlanError
from halfbyte.model.files import open_model_folder
from halfbyte.model.linear4bit import Linear4bit
from halfbyte.model.loading import load
from halfbyte.model.saving import save_quantized
from halfbyte.plan import matrices
from halfbyte.plan.audit import Audit, audit_folder, audit_folders, by_low_rank, find_models, ranked
from halfbyte.plan.matrices import NORMAL_ERROR, bytes_in_4bit, measure_matrix
from halfbyte.quant.codebook import codebook
from halfbyte.quant.weight import QuantSpec
from halfbyte.train.methods import ModelSize

REAL_MODELS = ("models/base-11m", "models/stories260K-hf", "models/capp-gpt-hf")
# The error of a sample of 4 million of 8 million normal weights differs from the whole's by less than this.
SAMPLE_WITHIN = 0.005


@pytest.fixture(scope="module")
def small(shared: Shared) -> Audit:
    return audit_folder(open_model_folder(shared("models/stories260K-hf")))


@pytest.mark.parametrize("model", REAL_MODELS)
def test_bytes_and_parameters_are_those_that_the_loader_makes(shared: Shared, model: str) -> None:
    """Everything beside linear layers is counted as it is stored, which is the dtype it is loaded in here."""
    folder = open_model_folder(shared(model))
    found = audit_folder(folder, spectra=False)
    dtype = next(t.dtype for t in folder.tensors.values())
    loaded = load(shared(model), quantization=QuantSpec(), dtype=dtype)
    size = ModelSize.of(loaded)
    assert found.bytes_4bit == size.nbytes
    assert found.parameters == size.total
    assert found.bytes_now == sum(t.nbytes for t in folder.tensors.values())
    quantised = {n: m.quantised_weight for n, m in loaded.named_modules() if isinstance(m, Linear4bit)}
    assert {m.name.removesuffix(".weight"): m.shape for m in found.matrices} == {
        name: weight.shape for name, weight in quantised.items()
    }
    assert [bytes_in_4bit(m.shape) for m in found.matrices] == [
        quantised[m.name.removesuffix(".weight")].nbytes for m in found.matrices
    ]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (129, 257), (512, 520)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_bytes_in_4_bits_are_exact(shape: tuple[int, int], double_quant: bool, blocksize: int) -> None:
    from halfbyte.kernels.ops import quantize_4bit

    spec = QuantSpec(double_quant=double_quant, blocksize=blocksize)  # type: ignore[arg-type]
    assert bytes_in_4bit(shape, spec) == quantize_4bit(torch.randn(*shape), spec).nbytes


def by_numpy(weight: np.ndarray[Any, Any]) -> float:
    """Relative error of NF4 with absmax scales of 64 in float32: scale, take the nearest value, scale back."""
    values = codebook("nf4").astype(np.float64)
    blocks = weight.astype(np.float64).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = values[np.abs((blocks / scales)[..., None] - values).argmin(axis=-1)] * scales
    return math.sqrt(((nearest - blocks) ** 2).sum() / (blocks**2).sum())


def test_errors_and_spectra_are_numpy_s(shared: Shared, small: Audit) -> None:
    tensors = load_file(shared("models/stories260K-hf") / "model.safetensors")
    total = lost = 0.0
    for matrix in small.matrices:
        weight = tensors[matrix.name].float().numpy()
        error = by_numpy(weight)
        # Scales in 8 bits move the error: by their own relative error, at most 1 in 100, added at right angles.
        assert matrix.error_absmax == pytest.approx(error, rel=0.01)
        squares = np.linalg.svd(weight.astype(np.float64), compute_uv=False) ** 2
        shares = np.cumsum(squares) / squares.sum()
        assert matrix.spectrum is not None
        assert matrix.spectrum.rank_90 == (shares < 0.90).sum() + 1
        assert matrix.spectrum.rank_99 == (shares < 0.99).sum() + 1
        assert matrix.spectrum.stable_rank == pytest.approx(squares.sum() / squares[0])
        rms = math.sqrt((weight**2).mean())
        assert matrix.outliers == pytest.approx((np.abs(weight) > 6 * rms).mean())
        total += float((weight.astype(np.float64) ** 2).sum())
        lost += error**2 * float((weight.astype(np.float64) ** 2).sum())
    assert small.error_absmax == pytest.approx(math.sqrt(lost / total), rel=0.01)
    assert small.error_mse is not None
    assert small.error_mse < 0.95 * (small.error_absmax or 0)


def test_errors_are_those_of_bitsandbytes(shared: Shared) -> None:
    from bitsandbytes import functional  # here, for it is slow to import

    weight = load_file(shared("models/base-11m") / "model.safetensors")[
        "model.layers.0.mlp.up_proj.weight"
    ].float()
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    lost = functional.dequantize_4bit(packed, state).float() - weight
    theirs = float(lost.double().norm() / weight.double().norm())
    ours = measure_matrix("w", weight, spectra=False)
    assert ours.error_absmax == pytest.approx(theirs, rel=1e-4)


def test_the_error_of_normal_weights_is_the_one_compared_with() -> None:
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(5))
    found = measure_matrix("normal", weight, spectra=False)
    assert found.error_absmax == pytest.approx(NORMAL_ERROR, rel=0.002)
    assert found.outliers == 0.0
    weight.view(-1)[:40] = 50.0
    heavy = measure_matrix("heavy", weight, spectra=False)
    assert heavy.outliers == pytest.approx(40 / weight.numel())


def test_large_matrices_are_sampled_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(6)
    weight = (
        torch.randn(4096, 2048, generator=random) * torch.linspace(0.5, 2, 4096)[:, None]
    )  # not alike from row to row
    found = measure_matrix("large", weight, spectra=False)
    monkeypatch.setattr(matrices, "SAMPLE", weight.numel())
    whole = measure_matrix("large", weight, spectra=False)
    assert (found.share, whole.share) == (0.5, 1.0)
    assert found.error_absmax == pytest.approx(whole.error_absmax, rel=SAMPLE_WITHIN)
    assert found.energy == pytest.approx(whole.energy, rel=SAMPLE_WITHIN)


@pytest.mark.parametrize("numel", [2**22 + 1, 2**22 + 2**14, 2**23 - 3, 5 * 2**22 + 7])
def test_a_sample_lies_within_the_matrix_in_runs_that_begin_where_blocks_do(numel: int) -> None:
    weight = torch.arange(numel, dtype=torch.float64).reshape(1, -1)
    sample = matrices._sample(weight)
    starts = [int(run[0]) for run in sample.double()]
    assert sample.numel() <= matrices.SAMPLE
    assert all(start % 64 == 0 for start in starts)
    assert len(set(starts)) == len(starts)
    assert max(starts) > 0.7 * numel


def test_an_encoder_is_audited(shared: Shared) -> None:
    found = audit_folder(open_model_folder(shared("models/all-MiniLM-L6-v2-fp16")), spectra=False)
    assert found.kind == "bert"
    assert len(found.matrices) == 6 * 6 + 1  # six projections a layer, and the pooler
    assert not any("embeddings" in m.name for m in found.matrices)
    assert 0.08 < (found.error_absmax or 0) < 0.1


def test_a_model_in_4_bits_is_said_to_be_so(shared: Shared, tmp_path: Path, small: Audit) -> None:
    source = shared("models/stories260K-hf")
    save_quantized(load(source, quantization=QuantSpec(), dtype=torch.float32), tmp_path / "nf4")
    audits, faults = audit_folders([tmp_path / "nf4", source])
    assert faults == []
    found = audits[-1]
    assert found.folder == tmp_path / "nf4"
    assert found.in_4bit == "nf4"
    assert found.bytes_4bit == found.bytes_now
    assert (found.error_absmax, found.error_mse) == (None, None)
    assert sorted(m.shape for m in found.matrices) == sorted(m.shape for m in small.matrices)
    assert found.parameters == small.parameters
    assert found.directions(90) == pytest.approx(small.directions(90), abs=0.05)
    assert found.expectations()[0].startswith("It is in nf4 already")


def test_tuning_is_reckoned_from_shapes(small: Audit) -> None:
    linear = sum(math.prod(m.shape) for m in small.matrices)
    adapter = 16 * sum(m.shape[0] + m.shape[1] for m in small.matrices)
    assert small.tuning.adapter_parameters == adapter
    assert small.tuning.flops_per_token == 4 * linear + 6 * adapter
    assert small.tuning.state_bytes == 16 * adapter
    assert small.tuning.base_bytes == small.bytes_4bit


def test_a_shard_at_a_time_gives_the_same(shared: Shared, tmp_path: Path, small: Audit) -> None:
    source, target = shared("models/stories260K-hf"), tmp_path / "sharded"
    target.mkdir()
    shutil.copyfile(source / "config.json", target / "config.json")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, target / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = audit_folder(open_model_folder(target))
    by_name = {m.name: m for m in found.matrices}
    assert [by_name[m.name] for m in small.matrices] == list(small.matrices)


def test_a_faulty_folder_is_listed_and_the_others_are_audited(shared: Shared, tmp_path: Path) -> None:
    good = tmp_path / "good"
    shutil.copytree(shared("models/stories260K-hf"), good, copy_function=shutil.copyfile)
    for folder in (tmp_path, good):
        folder.chmod(0o755)

    def broken(name: str) -> Path:
        shutil.copytree(good, tmp_path / name, copy_function=shutil.copyfile)
        return tmp_path / name

    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    for name, change in (("not finite", math.nan), ("other shape", None)):
        file = broken(name) / "model.safetensors"
        tensors = load_file(file)
        weight = tensors["model.layers.0.mlp.up_proj.weight"].clone()
        if change is None:
            weight = weight[:-1].contiguous()
        else:
            weight[0, 0] = change
        save_file(tensors | {"model.layers.0.mlp.up_proj.weight": weight}, file)
    nothing = broken("no linear layers") / "model.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, nothing)
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien/config.json").write_text('{"model_type": "alien"}', encoding="utf-8")

    seen: list[tuple[int, int]] = []
    audits, faults = audit_folders(
        find_models([tmp_path]), spectra=False, progress=lambda *at: seen.append(at)
    )
    assert [audit.folder.name for audit in audits] == ["good"]
    codes = {fault.folder.name: fault.why[:5] for fault in faults}
    assert codes == {
        "cut": "HB307",
        "not finite": "HB311",
        "other shape": "HB712",
        "no linear layers": "HB712",
        "alien": "HB306",
    }
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_models_are_found_below_a_folder_and_hidden_ones_left_alone(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/c/inner", ".cache/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
    assert find_models([tmp_path, tmp_path / "a"]) == [tmp_path / "a", tmp_path / "b/c"]
    with pytest.raises(PlanError, match="HB711.*no such folder"):
        find_models([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlanError, match="HB711.*config.json"):
        find_models([tmp_path / "empty"])


def test_rankings_follow_their_printed_rules(shared: Shared) -> None:
    audits, _ = audit_folders([shared(model) for model in REAL_MODELS])
    gains = [(a.bytes_now - a.bytes_4bit) / (a.error_mse or 1) for a in audits]
    assert gains == sorted(gains, reverse=True)
    assert ranked(reversed(audits)) == audits
    shares = [a.directions(90) or 0 for a in by_low_rank(audits)]
    assert shares == sorted(shares)
    assert by_low_rank([a for a in audits if a.directions(90) is None]) == []


def test_spectra_of_many_matrices_are_taken_of_some_evenly_spread(
    shared: Shared, small: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.plan.audit.SPECTRA", 3)
    found = audit_folder(open_model_folder(shared("models/stories260K-hf")))
    count = len(found.matrices)
    at = [i for i, m in enumerate(found.matrices) if m.spectrum is not None]
    assert at == [0, (count - 1) // 2, count - 1]
    assert [found.matrices[i] for i in at] == [small.matrices[i] for i in at]
    assert f"Spectra were measured of 3 of {count} matrices, evenly spread." in found.expectations()
    assert not any("evenly spread" in said for said in small.expectations())


def test_the_most_sensitive_layers_are_named(small: Audit) -> None:
    worst = max(small.matrices, key=lambda m: m.error_mse or 0)
    assert small.sensitive()[0] is worst
    assert worst.name in "\n".join(small.expectations())
    content = json.loads(json.dumps(small.as_dict(), allow_nan=False))
    assert content["sensitive"][0] == worst.name
    assert content["quality_cost"] is None
    assert "not measured" in content["quality_cost_why"]
