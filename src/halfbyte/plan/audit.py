"""Model folders that exist already: what 4 bits would save and lose in each, and what tuning it would take.

It owns which folders are looked at, what is added up over a model and the rules they are ranked by; it must not know
how a matrix is measured or how a ranking is shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from halfbyte.errors import HalfbyteError, PlanError
from halfbyte.kernels.ops import dequantize_4bit
from halfbyte.model.files import CONFIG, ModelFolder, open_model_folder
from halfbyte.model.linear4bit import is_conv1d
from halfbyte.model.loading import refuse_not_finite
from halfbyte.model.precision import stored_dtype
from halfbyte.model.purpose import VISION, Head, stored_labels
from halfbyte.model.skeleton import Slot, build_skeleton, slots
from halfbyte.model.stored_names import StoredNames
from halfbyte.plan.matrices import NORMAL_ERROR, SAMPLE, Matrix, bytes_in_4bit, measure_matrix
from halfbyte.quant.formats import entry_names, from_bitsandbytes, quantised_names

RULES = (
    "4 bits: first the model that saves the most bytes for each per cent of relative weight error (least-error "
    "scales); models in 4 bits already come last",
    "low rank: first the model whose matrices hold 90 % of their energy in the smallest share of their directions",
)
TRAINED_BYTES = 16
"""Of each adapter parameter while it trains: itself, its gradient and AdamW's two averages in float32."""
NOT_MEASURED = (
    "not measured: within a model the loss grows with the square of the weight error, but of two models measured one "
    "lost 35 times as much as the other at the same error, so that only an evaluation tells"
)
SENSITIVE = 3
SPECTRA = 64
"""Matrices of a model whose singular values are measured; of more, this many, evenly spread."""

Progress = Callable[[int, int], None]


class Tuning(NamedTuple):
    """What a QLoRA run of a model takes at one rank, beside its activations.

    Attributes:
        r: Rank.
        adapter_parameters: Numbers trained, on all linear layers.
        flops_per_token: Forward and backward, without attention and output head: 4 per frozen weight, 6 per trained.
        base_bytes: The frozen model in 4 bits.
        state_bytes: Adapters, gradients and AdamW's averages in float32.
    """

    r: int
    adapter_parameters: int
    flops_per_token: int
    base_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Audit:
    """One model folder.

    Attributes:
        folder: The folder.
        kind: Its `model_type`.
        parameters: All its numbers.
        bytes_now: Bytes of its tensors as they are stored.
        bytes_4bit: Bytes with the linear layers in 4 bits and everything else as it is.
        in_4bit: `nf4` or `fp4` if it is in 4 bits already, else empty.
        matrices: The weights of its linear layers.
        tuning: What tuning takes.
    """

    folder: Path
    kind: str
    parameters: int
    bytes_now: int
    bytes_4bit: int
    in_4bit: str
    matrices: tuple[Matrix, ...]
    tuning: Tuning

    @property
    def saved(self) -> int:
        """Bytes that 4 bits save."""
        return self.bytes_now - self.bytes_4bit

    @property
    def error_absmax(self) -> float | None:
        """Relative error of all linear weights together, with absmax scales; None where it is not known."""
        return _together((m.error_absmax, m.energy) for m in self.matrices)

    @property
    def error_mse(self) -> float | None:
        """The same with scales of least squared error."""
        return _together((m.error_mse, m.energy) for m in self.matrices)

    @property
    def outliers(self) -> float:
        """Share of linear weights that lie far out."""
        return sum(m.outliers * m.parameters for m in self.matrices) / sum(
            m.parameters for m in self.matrices
        )

    def directions(self, share: int) -> float | None:
        """Mean share of a matrix's directions that holds 90 or 99 % of its energy; None without spectra."""
        spectra = [m.spectrum for m in self.matrices if m.spectrum is not None]
        if not spectra:
            return None
        ranks = [(s.rank_90 if share == 90 else s.rank_99) / s.rank for s in spectra]
        return math.fsum(ranks) / len(ranks)

    def sensitive(self) -> list[Matrix]:
        """The layers that lose the largest share of themselves in 4 bits."""
        known = [m for m in self.matrices if m.error_mse is not None]
        return sorted(known, key=lambda m: -(m.error_mse or 0.0))[:SENSITIVE]

    def expectations(self) -> list[str]:
        """What to expect, in sentences that rest on what was measured and say on what."""
        said = []
        if self.in_4bit:
            said.append(f"It is in {self.in_4bit} already; what that lost is gone with the original weights.")
        elif self.error_absmax is not None and self.error_mse is not None:
            heavy = self.error_absmax / NORMAL_ERROR - 1
            said.append(
                f"4 bits make it {self.bytes_now / self.bytes_4bit:.2f} times smaller; its error is "
                f"{abs(heavy):.0%} {'above' if heavy > 0 else 'below'} that of normal weights, and least-error "
                f"scales take {1 - self.error_mse / self.error_absmax:.0%} off."
            )
            layers = ", ".join(f"{m.name} ({m.error_mse or 0:.1%})" for m in self.sensitive())
            said.append(f"It loses most in {layers}.")
        t = self.tuning
        said.append(
            f"Tuning at rank {t.r} trains {t.adapter_parameters / self.parameters:.2%} as many numbers as it has, at "
            f"{t.flops_per_token / 1e9:.3g} GFLOP a token without attention and output head."
        )
        sampled = sum(m.share < 1 for m in self.matrices)
        if sampled:
            said.append(f"Of {sampled} matrices the error was measured on {SAMPLE:,} weights each.")
        measured = sum(m.spectrum is not None for m in self.matrices)
        if 0 < measured < len(self.matrices):
            said.append(
                f"Spectra were measured of {measured} of {len(self.matrices)} matrices, evenly spread."
            )
        methods = {m.spectrum.method for m in self.matrices if m.spectrum and m.spectrum.method != "exact"}
        said += [f"Spectra of large matrices are {method}." for method in sorted(methods)]
        return said

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "in_4bit": self.in_4bit or None,
            "parameters": self.parameters,
            "bytes_now": self.bytes_now,
            "bytes_4bit": self.bytes_4bit,
            "error_absmax": self.error_absmax,
            "error_mse": self.error_mse,
            "expectations": self.expectations(),
            "quality_cost": None,
            "quality_cost_why": NOT_MEASURED,
            "outliers": self.outliers,
            "sensitive": [m.name for m in self.sensitive()],
            "directions_90": self.directions(90),
            "directions_99": self.directions(99),
            "tuning": self.tuning._asdict(),
            "matrices": [
                asdict(m) | {"spectrum": m.spectrum._asdict() if m.spectrum else None} for m in self.matrices
            ],
        }


class Fault(NamedTuple):
    """A folder that could not be audited.

    Attributes:
        folder: The folder.
        why: The error, with its code.
    """

    folder: Path
    why: str


def find_models(folders: Iterable[Path]) -> list[Path]:
    """Folders with a `config.json`: those given, and all below those given that have none.

    Raises:
        PlanError: HB711 if one does not exist, or there is no model at all.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise PlanError("HB711", "there is no such folder", where=str(folder), fix="name model folders")
        if (folder / CONFIG).is_file():
            found[folder] = None
            continue
        for path, below, files in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if CONFIG in files:
                found[Path(path)] = None
                below.clear()
    if not found:
        where = ", ".join(map(str, folders))
        raise PlanError(
            "HB711", f"no folder holds a {CONFIG}", where=where, fix="name a folder that holds models"
        )
    return list(found)


def audit_folders(
    folders: Iterable[Path], *, r: int = 16, spectra: bool = True, progress: Progress | None = None
) -> tuple[list[Audit], list[Fault]]:
    """Audit model folders; one that is faulty does not end it.

    Args:
        folders: From `find_models`.
        r: Rank of the tuning run that is reckoned.
        spectra: Measure singular values.
        progress: Told the bytes read of those of all folders.

    Returns:
        The audits, ranked by the first rule, and the folders that could not be audited.
    """
    opened, faults = [], []
    for path in folders:
        try:
            opened.append(open_model_folder(path))
        except HalfbyteError as error:
            faults.append(Fault(path, str(error).splitlines()[0]))
    total, done, audits = sum(map(_nbytes, opened)), 0, []

    def tell(read: int) -> None:
        if progress is not None:
            progress(done + read, total)

    for folder in opened:
        try:
            audits.append(audit_folder(folder, r=r, spectra=spectra, progress=tell))
        except HalfbyteError as error:
            faults.append(Fault(folder.path, str(error).splitlines()[0]))
        tell(_nbytes(folder))
        done += _nbytes(folder)
    return ranked(audits), faults


def ranked(audits: Iterable[Audit]) -> list[Audit]:
    """Audits by the first of `RULES`."""
    return sorted(audits, key=lambda a: (not a.error_mse, -a.saved / a.error_mse if a.error_mse else 0.0))


def by_low_rank(audits: Iterable[Audit]) -> list[Audit]:
    """Audits by the second of `RULES`; those without spectra are left out."""
    known = [(a.directions(90), a) for a in audits]
    return [a for _, a in sorted(((d, a) for d, a in known if d is not None), key=lambda pair: pair[0])]


def audit_folder(
    folder: ModelFolder, *, r: int = 16, spectra: bool = True, progress: Callable[[int], None] | None = None
) -> Audit:
    """Audit one model, a tensor at a time.

    Args:
        folder: The folder.
        r: Rank of the tuning run that is reckoned.
        spectra: Measure singular values.
        progress: Told the bytes read so far.

    Raises:
        ModelError: HB301, HB312, HB313 or HB350 for a model of no known kind, HB311 for weights that are not finite.
        PlanError: HB712 for one whose linear layers cannot be read.
    """
    layers, in_4bit = _linear_layers(folder), quantised_names(folder.tensors)
    matrices, own = [], set()
    measured = set(_spread(list(layers), SPECTRA) if spectra else ())
    for name, slot in layers.items():
        weight = _weight(folder, name, slot, in_4bit)
        matrices.append(measure_matrix(name, weight, in_4bit=name in in_4bit, spectra=name in measured))
        own |= {name, *entry_names(name, folder.tensors)}
        if progress is not None:
            progress(sum(folder.tensors[part].nbytes for part in own))
    others = [tensor for name, tensor in folder.tensors.items() if name not in own]
    linear = sum(m.parameters for m in matrices)
    adapter = sum(r * sum(m.shape) for m in matrices)
    in_bits = sum(t.nbytes for t in others) + sum(bytes_in_4bit(m.shape) for m in matrices)
    bytes_4bit = _nbytes(folder) if in_4bit else in_bits
    return Audit(
        folder=folder.path,
        kind=str(folder.config.get("model_type", "")),
        parameters=linear + sum(math.prod(tensor.shape) for tensor in others),
        bytes_now=_nbytes(folder),
        bytes_4bit=bytes_4bit,
        in_4bit=next(iter(in_4bit.values())).rpartition("__")[2] if in_4bit else "",
        matrices=tuple(matrices),
        tuning=Tuning(r, adapter, 4 * linear + 6 * adapter, bytes_4bit, TRAINED_BYTES * adapter),
    )


def _linear_layers(folder: ModelFolder) -> dict[str, Slot]:
    """Stored name → place of every weight that `load` would hold in 4 bits."""
    model = build_skeleton(folder, stored_dtype(folder), _head(folder))
    places = {name: slot for slot in slots(model) for name in slot.names}
    names = StoredNames(model)
    found = {}
    for stored in folder.tensors:
        slot = places.get(names.in_model(stored, places))
        if slot is not None and slot.linear is not None:
            found[stored] = slot
    if not found:
        raise PlanError(
            "HB712",
            "none of its tensors is the weight of a linear layer",
            where=str(folder.path),
            fix="audit the 16-bit folder of a transformer, or one in bitsandbytes' 4 bits",
        )
    return found


def _head(folder: ModelFolder) -> Head | None:
    """What stands on the model, as `load` is told it: nothing for one that writes."""
    if folder.config.get("model_type") in VISION:
        return Head("classify_images", stored_labels(folder.path))
    writers = (*MODEL_FOR_CAUSAL_LM_MAPPING.values(), *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING.values())
    names = {
        kind.__name__
        for found in writers
        for kind in (found if isinstance(found, tuple) else (found,))
        if kind is not None
    }
    return None if names & set(folder.config.get("architectures") or ()) else Head("embed")


def _weight(folder: ModelFolder, name: str, slot: Slot, in_4bit: Iterable[str]) -> Tensor:
    """A layer's weight as (N, K), finite."""
    assert slot.linear is not None
    if name in in_4bit:
        entries = {part: folder.tensors[part].read() for part in entry_names(name, folder.tensors)}
        entries[name] = entries[name].reshape(-1).view(torch.uint8)
        return dequantize_4bit(from_bitsandbytes(name, entries), torch.float32)
    stored = folder.tensors[name]
    if stored.shape != slot.shape or not stored.dtype.is_floating_point:
        raise PlanError(
            "HB712",
            f"{name} is {stored.dtype} {stored.shape}, its layer's weight {slot.dtype} {slot.shape}",
            where=str(stored.file),
            fix="audit the 16-bit folder; this one may be quantised by another tool",
        )
    weight = stored.read()
    refuse_not_finite(name, str(stored.file), weight)
    return weight.T.contiguous() if is_conv1d(slot.linear) else weight


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of some names, evenly spread, first and last among them."""
    if len(names) <= most:
        return names
    return [names[i * (len(names) - 1) // (most - 1)] for i in range(most)]


def _nbytes(folder: ModelFolder) -> int:
    return sum(tensor.nbytes for tensor in folder.tensors.values())


def _together(parts: Iterable[tuple[float | None, float]]) -> float | None:
    """Relative errors of parts as that of the whole."""
    known = [(error, energy) for error, energy in parts if error is not None]
    total = math.fsum(energy for _, energy in known)
    return math.sqrt(math.fsum(e * e * energy for e, energy in known) / total) if total else None
