"""What stands in for files while a step runs on tensors without memory: pages and waiting activations are nowhere.

It owns what such files would hold in memory; it must not know how a forecast uses that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from halfbyte.model.offload import Offload, Waiting
from halfbyte.train.paging import Discarded


class Unkept(Discarded):
    """Pages of which nothing is read: what a buffer holds does not matter."""

    def read(self, offset: int, into: memoryview) -> None:
        """Nothing happens."""


class Nowhere(Offload):
    """A file that does not exist. What is put last is in memory, for it is being written; so is what is read ahead.

    Args:
        folder: Of no use.
        reserved_bytes: Of no use.
    """

    def __init__(self, folder: Path, reserved_bytes: int) -> None:
        self.folder = folder
        self._stack: list[Waiting] = []
        self._ahead: dict[str, Tensor] | None = None
        self._like: Tensor | None = None  # takes no memory, as what is made of it

    def put(self, tensors: Mapping[str, Tensor]) -> Waiting:
        """Tensors begin to wait; those before are written."""
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._like = next(iter(own.values())).new_empty(0)
        if self._stack:
            self._stack[-1].unwritten = None
        self._stack.append(Waiting(own, 0, 0))
        return self._stack[-1]

    def take(self, waiting: Waiting) -> dict[str, Tensor]:
        """Tensors as they were put; those that were put before them are read ahead."""
        while self._stack and self._stack.pop() is not waiting:
            pass
        found, self._ahead = self._ahead or self._empty(waiting), None
        waiting.unwritten = None
        if self._stack:
            self._ahead = self._empty(self._stack[-1])
        return found

    def _empty(self, waiting: Waiting) -> dict[str, Tensor]:
        assert self._like is not None
        return {
            name: self._like.new_empty(shape, dtype=dtype) for name, (shape, dtype) in waiting.forms.items()
        }
