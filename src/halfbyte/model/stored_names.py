"""By which names a model's tensors may stand in a file: its own, those without its head, those of older releases.

It owns the ways from a stored name to the model's; it must not know files or what a tensor is for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming


class StoredNames:
    """What stored names mean in a model.

    Args:
        model: Any model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: str = model.base_model_prefix
        mapping = get_model_conversion_mapping(model)
        self._renames = [rename for rename in mapping if type(rename) is WeightRenaming]

    def in_model(self, stored: str, known: Collection[str]) -> str:
        """The model's name of a stored tensor; the stored one where the model has none.

        A file saved from the model without its head lacks the base's prefix; one with another head has it. Files
        written before transformers gave a family's modules other names have the old ones, and it writes them still.

        Args:
            stored: Name in the file.
            known: Names in the model.
        """
        return next((name for name in self._forms(stored) if name in known), stored)

    def _forms(self, stored: str) -> Iterator[str]:
        own = (stored, f"{self._base}.{stored}", stored.removeprefix(f"{self._base}."))
        yield from own
        yield from map(self._renamed, own)

    def _renamed(self, stored: str) -> str:
        for rename in self._renames:
            stored, _ = rename.rename_source_key(stored)
        return stored
