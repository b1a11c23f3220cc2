"""Counting the bytes of tensors that live while real code runs on tensors without memory.

It owns tensors without memory and the count of what lives, by what it was made for; it must not know models,
settings, or what is done with the count.

A tensor without memory has shape, strides and dtype and says that it lies on the CPU; operations on it make others of
the right shape and compute nothing. What is computed from real, small tensors (positions, documents, labels) is
computed for real, so that code which looks at numbers takes its usual way.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from halfbyte.plan.heap import Block, Heap

Scratch = Callable[..., list[int]]
"""Sizes of the blocks that a kernel takes beside its results, from its arguments."""

OBJECT_BYTES = 700
"""About what torch keeps of a tensor beside its numbers: the tensor, its storage, its node in the graph. They lie
between the numbers of others and keep freed memory from growing together."""

HEAP_SLACK = 0.055
"""Of what comes and goes, how much more a real heap takes than the imitated one: slivers cut off for alignment keep
its free blocks apart. Measured: bench/forecast.py."""

_SHOWN = 2.0
"""What a number without memory is taken for where code asks: finite, true, and a norm that is clipped."""


class Moment(NamedTuple):
    """What is in memory at one time.

    Attributes:
        phase: What was being done.
        resident: Bytes taken from the system.
        live: Bytes of tensors and scratch by kind, no more than `resident`.
    """

    phase: str
    resident: int
    live: Counter[str]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages made within it, until each is gone.

    Args:
        scratch: Of operations that take memory beside their results, by name.
        kinds: What results and scratch of operations are for, by name, where it is not what the rest is for.

    Attributes:
        live: Bytes now, by kind.
        phase: What is being done; `peaks` are kept by it.
        kind: What storages are made for from now on.
        peaks: The moment of most resident memory of each phase.
        layer_bytes: Of the largest layer that lies in a mapped file.
        mapped: Bytes of files that are in memory, by kind: while something of that kind is at work, else under "".
    """

    def __init__(self, scratch: Mapping[str, Scratch], kinds: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch, self._kinds = scratch, kinds
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[weakref.ref[Any], str, int, tuple[Block, ...]]] = {}
        self._heap = Heap()
        self.live: Counter[str] = Counter()
        self.phase = self.kind = ""
        self.peaks: dict[str, Moment] = {}
        self.mapped: dict[str, int] = {"": 0}
        self.layer_bytes = 0

    @property
    def held(self) -> Counter[str]:
        """Bytes now by kind, with those of mapped files."""
        return self.live + Counter(base=self.mapped[""])

    @contextmanager
    def doing(self, phase: str, kind: str) -> Iterator[None]:
        """Within the block a phase goes on, and storages are made for `kind`."""
        before = self.phase, self.kind
        self.phase, self.kind = phase, kind
        try:
            yield
        finally:
            self.phase, self.kind = before

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, counted: bool = True) -> Tensor:
        """A tensor without memory."""
        with _disable_current_modes(), self._fake:
            made = torch.empty(shape, dtype=dtype)
        self._note(made, self.kind, made.untyped_storage().nbytes() if counted else 0)
        return made

    def know(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor that was there before."""
        self._note(tensor, kind, tensor.untyped_storage().nbytes())

    def call_it(self, tensor: Tensor | None, kind: str) -> None:
        """Count a tensor's storage as of another kind from now on."""
        key = 0 if tensor is None else id(tensor.untyped_storage())
        if key in self._known:
            ref, before, nbytes, blocks = self._known[key]
            self._known[key] = (ref, kind, nbytes, blocks)
            self.live[before] -= nbytes
            self.live[kind] += nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what an operation makes."""
        kwargs = kwargs or {}
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        if func is torch.ops.aten._local_scalar_dense.default and fakes:
            return _SHOWN if fakes[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and _is_selection(*args):
            (selected,) = args[1]
            out = args[0].new_empty((int(selected.sum()), *args[0].shape[selected.dim() :]))
        else:
            out = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        kind = self._kinds.get(name, self.kind)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, kind, tensor.untyped_storage().nbytes())
        if name in self._scratch:
            self._pass(self._scratch[name](*args, **kwargs), self._kinds.get(name, "buffers"))
        return out

    def _pass(self, sizes: list[int], kind: str) -> None:
        """Memory that is taken and given back at once."""
        blocks = [self._heap.take(size) for size in sizes]
        self.live[kind] += sum(sizes)
        self._look(kind)
        self.live[kind] -= sum(sizes)
        for block in blocks:
            self._heap.give(block)

    def _note(self, tensor: Tensor, kind: str, nbytes: int) -> None:
        """Count a storage unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known and self._known[key][0]() is storage:
            return
        ref = weakref.ref(storage, lambda _: self._gone(key))
        blocks = (self._heap.take(nbytes), self._heap.take(OBJECT_BYTES))
        self._known[key] = (ref, kind, nbytes, blocks)
        self.live[kind] += nbytes
        self._look()

    def _gone(self, key: int) -> None:
        _, kind, nbytes, blocks = self._known.pop(key)
        self.live[kind] -= nbytes
        for block in blocks:
            self._heap.give(block)

    def _look(self, at_work: str = "") -> None:
        mapped = self.mapped.get(at_work, self.mapped[""])
        heap = self._heap.resident
        churned = heap - self.live["base"] - self.live["adapters"]
        resident = heap + int(HEAP_SLACK * churned) + mapped
        phase = at_work if at_work == "loss" else self.phase
        known = self.peaks.get(phase)
        so_far = (0, 0) if known is None else (known.resident, known.live.total())
        if (resident, self.live.total() + mapped) > so_far:
            self.peaks[phase] = Moment(phase, resident, self.live + Counter(base=mapped))


def _is_selection(tensor: Any, indices: Any) -> bool:
    """Whether a tensor without memory is indexed by a real mask."""
    return isinstance(tensor, FakeTensor) and len(indices) == 1 and indices[0].dtype == torch.bool
