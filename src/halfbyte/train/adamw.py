"""AdamW whose state takes little memory: in 8 bits, on pages outside of memory, or both.

It owns how the state is laid out and which part of it is where; it knows nothing of models, schedules or settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from halfbyte.kernels.adamw import STATE_BLOCK, AdamWFactors, State8bit, adamw_8bit_
from halfbyte.train.paging import BUFFER_BYTES, LINE, Buffers, MakePages, Span

Bits = Literal[8, 32]
Group = dict[str, Any]

LEAST = 4096
"""Parameters of fewer numbers have a state of 32 bits in memory, as in bitsandbytes."""


class Form(NamedTuple):
    """How the state of N numbers is kept.

    Attributes:
        arrays: Name → dtype, and how many of the N numbers share an entry.
        update: Steps parameter and arrays, given both, the gradient, the group and which step it is, from 1.
    """

    arrays: Mapping[str, tuple[torch.dtype, int]]
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Group, int], None]

    def entries(self, count: int) -> list[tuple[str, torch.dtype, int]]:
        """Name, dtype and length of each array for `count` numbers."""
        return [(name, dtype, -(-count // shared)) for name, (dtype, shared) in self.arrays.items()]

    def nbytes(self, count: int) -> int:
        """Bytes of the arrays for `count` numbers."""
        return sum(dtype.itemsize * length for _, dtype, length in self.entries(count))

    def piece(self) -> int:
        """Most numbers whose arrays fit into a buffer, whole blocks."""
        return BUFFER_BYTES // self.nbytes(STATE_BLOCK) * STATE_BLOCK


def _update_8bit(p: Tensor, g: Tensor, arrays: Sequence[Tensor], group: Group, step: int) -> None:
    factors = AdamWFactors.of(group["lr"], group["betas"], group["eps"], group["weight_decay"], step=step)
    adamw_8bit_(p, g, State8bit(*arrays), factors)


def _update_32bit(p: Tensor, g: Tensor, arrays: Sequence[Tensor], group: Group, step: int) -> None:
    """Torch's own fused step, which does the same to each number wherever a tensor is cut between vectors."""
    average, squares = arrays
    beta1, beta2 = group["betas"]
    torch_adamw(
        [p],
        [g],
        [average],
        [squares],
        [],
        [torch.tensor(float(step - 1), device=p.device)],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


FORMS: dict[Bits, Form] = {
    8: Form(
        {
            "exp_avg": (torch.uint8, 1),
            "exp_avg_sq": (torch.uint8, 1),
            "exp_avg_scale": (torch.float32, STATE_BLOCK),
            "exp_avg_sq_scale": (torch.float32, STATE_BLOCK),
        },
        _update_8bit,
    ),
    32: Form({"exp_avg": (torch.float32, 1), "exp_avg_sq": (torch.float32, 1)}, _update_32bit),
}


def form_of(bits: Bits, count: int) -> Form:
    """How the state of a parameter of `count` numbers is kept."""
    return FORMS[32 if count < LEAST else bits]


class Place(NamedTuple):
    """Where the arrays of a parameter lie in the pages.

    Attributes:
        form: How they are kept.
        offsets: Name → byte.
    """

    form: Form
    offsets: Mapping[str, int]


def lay_out(counts: Sequence[int], bits: Bits) -> tuple[list[Place | None], int]:
    """Places of the states of parameters on pages.

    Args:
        counts: Numbers of each parameter.
        bits: Of the states.

    Returns:
        A place for each, None for what stays in memory; bytes of all pages.
    """
    places: list[Place | None] = []
    end = 0
    for count in counts:
        if count < LEAST:
            places.append(None)
            continue
        form, offsets = form_of(bits, count), {}
        for name, dtype, length in form.entries(count):
            offsets[name] = end
            end += _aligned(dtype.itemsize * length)
        places.append(Place(form, offsets))
    return places, end


def buffer_bytes(counts: Sequence[int], bits: Bits) -> int:
    """Bytes of each of the two buffers between memory and pages."""
    pieces = [(FORMS[bits], min(n, FORMS[bits].piece())) for n in counts if n >= LEAST]
    sizes = (sum(_aligned(dtype.itemsize * length) for _, dtype, length in f.entries(n)) for f, n in pieces)
    return max(sizes, default=0)


def _aligned(nbytes: int) -> int:
    """Bytes up to the next place where an array can begin."""
    return -(-nbytes // LINE) * LINE


class _Piece(NamedTuple):
    """A part of a parameter that is brought into memory at once."""

    parameter: Tensor
    gradient: Tensor
    form: Form
    group: Group
    step: int
    spans: list[Span]
    entries: list[tuple[str, torch.dtype, int]]


class SmallAdamW(torch.optim.Optimizer):
    """AdamW, its averages in 8 or 32 bits, in memory or on pages.

    With 32 bits on pages the weights are to the bit those of torch's fused AdamW. The state of each parameter has
    torch's names; averages in 8 bits have scales beside them. On pages, it shows the pages without holding them in
    memory.

    Args:
        params: Parameters or groups of them, float32 and contiguous.
        bits: Of the averages.
        pages: Makes the pages; None keeps the state in memory.
        lr: Learning rate; a group may have its own.
        betas: Decay of the average gradient and of its square.
        eps: Guard against division by zero.
        weight_decay: Decoupled; a group may have its own.

    Raises:
        TrainError: HB514 from the pages.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2; Dettmers et al., 8-bit
    Optimizers via Block-wise Quantization (2022), section 2; Dettmers et al., QLoRA (2023), section 3.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        *,
        bits: Bits,
        pages: MakePages | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._bits: Bits = bits
        every = [p for group in self.param_groups for p in group["params"]]
        counts = [p.numel() for p in every]
        places, size = lay_out(counts, bits)
        self._pages = pages(size) if pages is not None and size else None
        self._size = size
        self._memory: dict[torch.device, Tensor] = {}
        self._places = {p: place for p, place in zip(every, places, strict=True) if place}
        self._buffers = Buffers(buffer_bytes(counts, bits)) if self._pages is not None else None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient.

        Raises:
            TrainError: HB515 where pages cannot be read or written; some parameters have made the step then.
        """
        pieces: list[_Piece] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._begin(parameter)
                state["step"] += 1
                step, place = int(state["step"]), self._places.get(parameter)
                p, g = parameter.detach().view(-1), parameter.grad.reshape(-1)
                if place is None or self._pages is None:
                    form = form_of(self._bits, p.numel())
                    form.update(p, g, [state[name].view(-1) for name in form.arrays], group, step)
                else:
                    pieces.extend(_cut(p, g, place, group, step))
        if pieces and self._pages is not None and self._buffers is not None:
            self._pages.release()
            self._buffers.walk(
                self._pages, [piece.spans for piece in pieces], lambda i, b: _compute(pieces[i], b)
            )

    def put_state(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put a parameter's state back, as it once was in `state`.

        Args:
            parameter: One of the optimizer's.
            state: Its arrays and its step.

        Raises:
            TrainError: HB515.
        """
        mine, place = self._begin(parameter), self._places.get(parameter)
        for name, value in state.items():
            if place is None or self._pages is None or name not in place.offsets:
                mine[name].copy_(value)
            else:
                self._pages.write(place.offsets[name], value.contiguous().numpy().data.cast("B"))

    def _block(self, device: torch.device) -> Tensor:
        """Memory for every state on a device: one block, since many small ones among the activations of the first
        step would be in the way of the next."""
        if device not in self._memory:
            self._memory[device] = torch.zeros(self._size, dtype=torch.uint8, device=device)
        return self._memory[device]

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""
        place, count = self._places.get(parameter), parameter.numel()
        state = self.state[parameter] = {"step": torch.zeros(())}
        for name, dtype, length in form_of(self._bits, count).entries(count):
            if place is None:
                state[name] = torch.zeros(length, dtype=dtype, device=parameter.device)
            elif self._pages is not None:
                state[name] = self._pages.view(place.offsets[name], length, dtype)
            else:
                begin = place.offsets[name]
                found = self._block(parameter.device)[begin : begin + dtype.itemsize * length]
                state[name] = found.view(dtype)
        return state


def _cut(p: Tensor, g: Tensor, place: Place, group: Group, step: int) -> Iterator[_Piece]:
    """The pieces of a parameter, cut between blocks."""
    form, most = place.form, place.form.piece()
    for begin in range(0, p.numel(), most):
        count = min(most, p.numel() - begin)
        spans, at = [], 0
        for name, dtype, length in form.entries(count):
            before = begin // form.arrays[name][1] * dtype.itemsize
            spans.append(Span(place.offsets[name] + before, at, length * dtype.itemsize))
            at += _aligned(spans[-1].length)
        yield _Piece(
            p[begin : begin + count],
            g[begin : begin + count],
            form,
            group,
            step,
            spans,
            form.entries(count),
        )


def _compute(piece: _Piece, buffer: Tensor) -> None:
    """One step of a piece whose arrays lie in the buffer."""
    kept = [
        buffer[span.place : span.place + span.length].view(dtype)
        for span, (_, dtype, _) in zip(piece.spans, piece.entries, strict=True)
    ]
    arrays = [array.to(piece.parameter.device) for array in kept]
    piece.form.update(piece.parameter, piece.gradient, arrays, piece.group, piece.step)
    for there, here in zip(arrays, kept, strict=True):
        if there is not here:
            here.copy_(there)
