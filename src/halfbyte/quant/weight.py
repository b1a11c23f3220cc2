"""A weight matrix in 4 bits: what it is made of and how many bytes it takes.

It owns the parts and their consistency; it must not know how they are computed or which kernel reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from halfbyte.errors import KernelError
from halfbyte.quant.codebook import FORMATS, Format, dynamic_map

Scales = Literal["absmax", "mse"]
SCALES: tuple[Scales, ...] = get_args(Scales)
NESTED_BLOCKSIZE = 256
BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a weight is to be quantised.

    Attributes:
        format: 4-bit data type: `nf4` (normally distributed weights) or `fp4`.
        scales: `absmax` takes each block's largest magnitude as its scale, as bitsandbytes does; `mse` searches
            the scale with the least squared error. The bytes are laid out the same.
        double_quant: Store the scales themselves in 8 bits per 256 (4.127 instead of 4.5 bits per weight).
        blocksize: Weights per scale, row-major over the whole matrix.
    """

    format: Format = "nf4"
    scales: Scales = "absmax"
    double_quant: bool = True
    blocksize: int = 64

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {got!r}, expected one of {', '.join(map(str, allowed))}"
            for name, got, allowed in (
                ("format", self.format, FORMATS),
                ("scales", self.scales, SCALES),
                ("blocksize", self.blocksize, BLOCKSIZES),
            )
            if got not in allowed
        ]
        if faults:
            raise KernelError("HB402", "; ".join(faults), fix="use one of the values named")


@dataclass(frozen=True, slots=True)
class Weight4bit:
    """An (N, K) matrix of 4-bit codes with one scale per block of consecutive weights.

    Weight (n, k) is element e = n·K + k; its code is the high nibble of byte e/2 for even e, the low one for odd
    e; its value is `codebook[code] · scale[e / blocksize]`. With double quantization
    `scale[g] = nested_codebook[scales[g]] · nested_scales[g / 256] + offset`, each operation rounded to float32.

    Attributes:
        codes: (ceil(N·K / 2),) uint8.
        scales: (G,) float32, or (G,) uint8 when double-quantised; G = ceil(N·K / blocksize).
        codebook: (16,) float32.
        shape: (N, K).
        dtype: Of the matrix it was made from, and the default when it is dequantised.
        format: `nf4` or `fp4`.
        blocksize: Weights per scale.
        nested_scales: (ceil(G / 256),) float32, or None.
        nested_codebook: (256,) float32, or None.
        offset: () float32, or None.

    Raises:
        KernelError: HB405 when the parts do not fit together.

    Source: the bitsandbytes 4-bit format, `Params4bit` and `QuantState`.
    """

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    format: Format = "nf4"
    blocksize: int = 64
    nested_scales: Tensor | None = None
    nested_codebook: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        N, K = self.shape
        G = -(-N * K // self.blocksize)
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, ((N * K + 1) // 2,)),
            "scales": (torch.uint8 if self.double_quantised else torch.float32, (G,)),
            "codebook": (torch.float32, (16,)),
        }
        if self.double_quantised:
            expected["nested_scales"] = (torch.float32, (-(-G // NESTED_BLOCKSIZE),))
            expected["nested_codebook"] = (torch.float32, (256,))
            expected["offset"] = (torch.float32, ())
        faults = []
        if self.blocksize not in BLOCKSIZES:
            faults.append(f"blocksize {self.blocksize} is none of {BLOCKSIZES}")
        if set(self.tensors()) != set(expected):
            faults.append(f"parts {sorted(self.tensors())}, expected {sorted(expected)}")
        faults += [
            f"{name} is {got.dtype} {tuple(got.shape)}, expected {expected[name][0]} {expected[name][1]}"
            for name, got in self.tensors().items()
            if name in expected and (got.dtype, tuple(got.shape)) != expected[name]
        ]
        if faults:
            raise KernelError(
                "HB405", f"for shape {self.shape}: " + "; ".join(faults), fix="quantise it again"
            )

    @classmethod
    def blank(cls, shape: tuple[int, int], dtype: torch.dtype, spec: QuantSpec) -> Self:
        """A weight of this shape and kind whose tensors take no memory: they say how many bytes it will have."""
        groups = -(-shape[0] * shape[1] // spec.blocksize)
        nested = {
            "nested_scales": torch.empty(-(-groups // NESTED_BLOCKSIZE), device="meta"),
            "nested_codebook": torch.empty(256, device="meta"),
            "offset": torch.zeros(()),
        }
        return cls(
            codes=torch.empty((shape[0] * shape[1] + 1) // 2, dtype=torch.uint8, device="meta"),
            scales=torch.empty(
                groups, dtype=torch.uint8 if spec.double_quant else torch.float32, device="meta"
            ),
            codebook=torch.empty(16, device="meta"),
            shape=shape,
            dtype=dtype,
            format=spec.format,
            blocksize=spec.blocksize,
            **(nested if spec.double_quant else {}),
        )

    @property
    def double_quantised(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_scales is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by attribute name, those that are None left out."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def parts(self) -> WeightParts:
        """Its tensors and sizes in the order in which the operations take them."""
        return WeightParts(
            self.codes,
            self.scales,
            self.codebook,
            self.nested_scales,
            self.nested_codebook,
            self.offset,
            self.blocksize,
            *self.shape,
        )


class WeightParts(NamedTuple):
    """A quantised weight as the operations take it; fields as in `Weight4bit`."""

    codes: Tensor
    scales: Tensor
    codebook: Tensor
    nested_scales: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    blocksize: int
    N: int
    K: int


class StoredScales(NamedTuple):
    """Scales as they are stored, in 8 bits or not; fields as in `Weight4bit`."""

    scales: Tensor
    nested_scales: Tensor | None = None
    nested_codebook: Tensor | None = None
    offset: Tensor | None = None


def nest_scales(scales: Tensor) -> StoredScales:
    """Store scales in 8 bits: their mean taken off, then the nearest value of the dynamic map per block of 256.

    Args:
        scales: (G,) float32.

    Source: QLoRA (arXiv 2305.14314), section 3, "Double Quantization".
    """
    offset = scales.mean()
    centred = torch.nn.functional.pad(scales - offset, (0, -scales.numel() % NESTED_BLOCKSIZE))
    blocks = centred.reshape(-1, NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(dim=1)
    normalised = blocks / largest.where(largest > 0, torch.ones_like(largest))[:, None]
    codes = nearest_codes(normalised.reshape(-1)[: scales.numel()])
    return StoredScales(codes, largest, torch.from_numpy(dynamic_map().copy()), offset)


def nearest_codes(normalised: Tensor) -> Tensor:
    """The places of the nearest values of the dynamic map: where two are as near, the lower one.

    A number's upper 16 bits leave at most one edge between two values to compare it with: they are looked up, which
    is several times as fast as a search.

    Args:
        normalised: (G,) float32, contiguous, without NaN.

    Returns:
        (G,) uint8.
    """
    first, edges = _steps()
    upper = (normalised.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    below = torch.index_select(first, 0, upper)
    edge = torch.index_select(edges, 0, below)
    return below.add_(normalised > edge).to(torch.uint8)


@cache
def _steps() -> tuple[Tensor, Tensor]:
    """How many edges lie below all floats with these upper 16 bits, (65536,) int32; and the edges, then infinity."""
    values = torch.from_numpy(dynamic_map().copy())
    edges = (values[1:] + values[:-1]) / 2
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    lowest = torch.minimum(upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32))
    first = torch.bucketize(lowest.nan_to_num(), edges, out_int32=True)
    return first, torch.cat([edges, torch.tensor([torch.inf])])


def decode_scales(stored: StoredScales | WeightParts) -> Tensor:
    """The (G,) float32 scales, whether stored in 8 bits or not; each operation rounded to float32."""
    if stored.nested_scales is None or stored.nested_codebook is None or stored.offset is None:
        return stored.scales
    per_scale = stored.nested_scales.repeat_interleave(NESTED_BLOCKSIZE)[: stored.scales.numel()]
    return stored.nested_codebook[stored.scales.long()] * per_scale + stored.offset
