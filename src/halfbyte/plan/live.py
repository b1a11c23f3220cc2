"""Counting the bytes of tensors that live while real code runs on tensors without memory.

It owns tensors without memory and what is told of them to the count; it must not know models, settings, or what is
done with the count.

A tensor without memory has shape, strides and dtype and says that it lies on the CPU; operations on it make others of
the right shape and compute nothing. What is computed from real, small tensors (positions, documents, labels) is
computed for real, so that code which looks at numbers takes its usual way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from halfbyte.plan.count import Count, Event

Scratch = Callable[..., list[int]]
"""Sizes of the blocks that a kernel takes beside its results, from its arguments."""

_SHOWN = 2.0
"""What a number without memory is taken for where code asks: finite, true, and a norm that is clipped."""


_CPU = torch.device("cpu")

_LARGE = 1 << 16
"""Numbers from which on zeros are not made for real: they are some optimizer's state."""


class _Tensor(NamedTuple):
    """What a tensor is, but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _form(of: Any) -> Any:
    """Arguments or results with every tensor as its form, and every list as a tuple."""
    if isinstance(of, Tensor):
        return _Tensor(tuple(of.shape), of.stride(), of.dtype)
    return tuple(map(_form, of)) if isinstance(of, list | tuple) else of


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages made within it, until each is gone.

    Args:
        scratch: Of operations that take memory beside their results, by name.
        kinds: What results and scratch of operations are for, by name, where it is not what the rest is for.

    Attributes:
        count: What it comes to.
        phase: What is being done.
        kind: What storages are made for from now on.
        layer_bytes: Of the largest layer that lies in a mapped file.
    """

    def __init__(self, scratch: Mapping[str, Scratch], kinds: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch, self._kinds = scratch, kinds
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._forms: dict[Any, Any] = {}
        self._made = 0
        self._tape: list[Event] | None = None
        self.count = Count()
        self.phase = self.kind = ""
        self.layer_bytes = 0

    @contextmanager
    def doing(self, phase: str, kind: str) -> Iterator[None]:
        """Within the block a phase goes on, and storages are made for `kind`."""
        before = self.phase, self.kind
        self.phase, self.kind = phase, kind
        try:
            yield
        finally:
            self.phase, self.kind = before

    @contextmanager
    def recorded(self) -> Iterator[list[Event]]:
        """What would be told to the count within the block, to be told once or more afterwards."""
        before, self._tape = self._tape, []
        try:
            yield self._tape
        finally:
            self._tape = before

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
            self._tell(("call", self._known[key][1], kind, 0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count what an operation makes."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _CPU
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        if func is torch.ops.aten._local_scalar_dense.default and fakes:
            return _SHOWN if fakes[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and _is_selection(*args):
            (selected,) = args[1]
            out = args[0].new_empty((int(selected.sum()), *args[0].shape[selected.dim() :]))
        elif func is torch.ops.aten.zeros.default and math.prod(args[0]) >= _LARGE:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            out = self._of_form(_Tensor(tuple(args[0]), _strides(args[0]), dtype))
        elif fakes and func._schema.is_mutable and not func._schema.returns:
            out = None  # numbers that are not there change
        elif fakes and func.namespace == "halfbyte":
            out = self._known_form(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        kind = self._kinds.get(name, self.kind)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor, kind, tensor.untyped_storage().nbytes())
        if name in self._scratch:
            passing = self._kinds.get(name, "buffers")
            self._tell(("pass", tuple(self._scratch[name](*args, **kwargs)), passing, 0))
        return out

    def _known_form(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What one of our own operations makes, which is new memory whose form follows from its arguments' forms."""
        key = (func, _form(args), _form(tuple(kwargs.items())))
        if key not in self._forms:
            out = func(*args, **kwargs)
            self._forms[key] = _form(out)
            return out
        return self._of_form(self._forms[key])

    def _of_form(self, form: Any) -> Any:
        if isinstance(form, _Tensor):
            with _disable_current_modes():
                held = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
                return FakeTensor(self._fake, held, _CPU)
        return tuple(map(self._of_form, form)) if isinstance(form, tuple) else form

    def _note(self, tensor: Tensor, kind: str, nbytes: int) -> None:
        """Count a storage unless it is known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known and self._known[key][0]() is storage:
            return
        self._made += 1
        self._known[key] = (weakref.ref(storage, lambda _: self._gone(key)), self._made)
        self._tell(("take", self._made, kind, nbytes))

    def _gone(self, key: int) -> None:
        self._tell(("give", self._known.pop(key)[1], "", 0))

    def _tell(self, what: tuple[str, Any, str, int]) -> None:
        event = Event(self.phase, *what)
        if self._tape is not None:
            self._tape.append(event)
        else:
            self.count.take_note(event)


def _is_selection(tensor: Any, indices: Any) -> bool:
    """Whether a tensor without memory is indexed by a real mask."""
    return isinstance(tensor, FakeTensor) and len(indices) == 1 and indices[0].dtype == torch.bool
