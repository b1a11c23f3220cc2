"""Texts as an encoder takes them: the tokenizer's own special tokens, pairs in its own encoding, cut where too long.

It owns tokens, segments and targets of such rows and their arrays; it must not know what classes mean or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.pack import UNTRAINED, Batch, collate, pack
from halfbyte.data.row import Row
from halfbyte.data.tokenise import ROWS_AT_ONCE, Example
from halfbyte.errors import DataError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample(Example):
    """A text or a pair of texts as an encoder takes it.

    Attributes:
        segments: Which text each token belongs to, int32, (T,); None where the model is not told.
        targets: Number of each token's class, -100 where it has none, int64, (T,); None where tokens have no classes.
    """

    segments: NDArray[np.int32] | None = None
    targets: NDArray[np.int64] | None = None

    @property
    def content(self) -> bytes:
        """Its tokens with their segments and classes, and its id, which is of the row's label too."""
        beside = [part.tobytes() for part in (self.segments, self.targets) if part is not None]
        return b"".join([self.input_ids.tobytes(), *beside, self.id.encode()])


@dataclass(frozen=True)
class EncodedBatch(Batch):
    """Documents for an encoder.

    Attributes:
        segments: Which text each token belongs to, int64, (B, T), 0 on padding; None where the model is not told.
    """

    segments: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Text:
    """What is to be encoded.

    Attributes:
        first: The text.
        second: The other one of a pair; None for a single text.
        id: Content hash of the row.
        where: `file:line` of the row.
    """

    first: str
    second: str | None
    id: str
    where: str


def encode(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedExample]:
    """Tokenise texts and pairs; of those that are too long the longer text is cut, token by token, at its end.

    Args:
        texts: What is to be encoded.
        tokenizer: The model's.
        max_length: Tokens to keep of each, special ones included.

    Returns:
        In the order given.

    Raises:
        DataError: HB230 if `max_length` holds no more than the special tokens.
    """
    found: dict[int, EncodedExample] = {}
    for pairs in (False, True):
        chosen = [at for at, text in enumerate(texts) if (text.second is not None) == pairs]
        refuse_no_room(tokenizer, max_length, chosen, pairs=pairs)
        for begin in range(0, len(chosen), ROWS_AT_ONCE):
            part = chosen[begin : begin + ROWS_AT_ONCE]
            found.update(zip(part, _encode([texts[at] for at in part], tokenizer, max_length), strict=True))
    return [found[at] for at in range(len(texts))]


def refuse_no_room(
    tokenizer: PreTrainedTokenizerBase, max_length: int, rows: Sequence[object], *, pairs: bool = False
) -> None:
    """Refuse a length that holds nothing of a text: HB230."""
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if rows and max_length <= special + pairs:
        raise DataError(
            "HB230",
            f"{max_length} tokens, of which {special} are the tokenizer's own, leave no room for "
            + ("two texts" if pairs else "a text"),
            where="data.max_length",
            fix=f"set data.max_length to {special + 1 + pairs} or more; 64 to 512 are usual",
        )


def _encode(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedExample]:
    """Texts of one kind, all single or all pairs."""
    examples = _encoded(texts, tokenizer, None)
    long = [at for at, example in enumerate(examples) if len(example.input_ids) > max_length]
    if long:
        for at, cut in zip(long, _encoded([texts[at] for at in long], tokenizer, max_length), strict=True):
            examples[at] = cut
    return examples


def _encoded(
    texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[EncodedExample]:
    pairs = None if texts[0].second is None else [text.second or "" for text in texts]
    found = tokenizer(
        [text.first for text in texts],
        pairs,
        truncation="longest_first" if max_length else False,
        max_length=max_length,
        return_attention_mask=False,
        verbose=False,
    )
    segments = found.get("token_type_ids", [None] * len(texts))
    return [
        EncodedExample(
            np.array(ids, np.int32),
            np.zeros(len(ids), np.bool_),
            None,
            None,
            text.id,
            text.where,
            truncated=max_length is not None,
            segments=None if of is None else np.array(of, np.int32),
        )
        for text, ids, of in zip(texts, found["input_ids"], segments, strict=True)
    ]


def encode_words(
    rows: Sequence[Row], tags: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedExample]:
    """Tokenise words with their tags: the first token of a word has its class, its others and special ones none.

    Args:
        rows: Of words with tags.
        tags: Names of the classes, in the order of their numbers.
        tokenizer: The model's, a fast one.
        max_length: Tokens to keep of each row, special ones included.

    Raises:
        DataError: HB230 if `max_length` holds no more than the special tokens, HB233 naming rows without a readable
            word.
    """
    refuse_no_room(tokenizer, max_length, rows)
    number = {name: at for at, name in enumerate(tags)}
    found: list[EncodedExample] = []
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[begin : begin + ROWS_AT_ONCE]
        words = [[word for word, _ in row.tags] for row in part]
        encoded = tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        for at, row in enumerate(part):
            targets = np.full(len(encoded["input_ids"][at]), UNTRAINED, np.int64)
            seen: set[int] = set()
            for place, word in enumerate(encoded.word_ids(at)):
                if word is not None and word not in seen:
                    seen.add(word)
                    targets[place] = number[row.tags[word][1]]
            found.append(_tagged(row, np.array(encoded["input_ids"][at], np.int32), targets))
    if empty := [example.where for example in found if not example.trained.any()]:
        raise DataError(
            "HB233",
            f"{len(empty)} of {len(rows)} rows hold no word that the tokenizer makes a token of"
            + listed(empty),
            fix="mend or remove these rows",
        )
    return found


def _tagged(row: Row, ids: NDArray[np.int32], targets: NDArray[np.int64]) -> EncodedExample:
    trained = targets != UNTRAINED
    lost = int(trained.sum()) < len(row.tags)  # cut off, or words of which the tokenizer leaves nothing
    return EncodedExample(ids, trained, None, None, row.id, row.where, truncated=lost, targets=targets)


def collate_encoded(examples: Sequence[Example], pad_id: int | None) -> EncodedBatch:
    """Lay examples side by side, filled up at the right, or end to end in one row.

    Args:
        examples: At least one, in the order they are to have.
        pad_id: Id to fill with; None lays them end to end.
    """
    batch = pack(examples) if pad_id is None else collate(examples, pad_id)
    encoded = [example for example in examples if isinstance(example, EncodedExample)]
    laid = {field.name: getattr(batch, field.name) for field in fields(Batch)}
    if targets := [e.targets for e in encoded if e.targets is not None]:
        laid["labels"] = _laid(batch, targets, UNTRAINED)
    segments = [e.segments for e in encoded if e.segments is not None]
    return EncodedBatch(**laid, segments=_laid(batch, segments, 0) if segments else None)


def _laid(batch: Batch, values: Sequence[NDArray[np.generic]], empty: int) -> NDArray[np.int64]:
    """Values of each document's tokens where these lie in the batch, int64, (B, T)."""
    laid = np.full(batch.input_ids.shape, empty, np.int64)
    for (row, begin, end), of in zip(batch.documents, values, strict=True):
        laid[row, begin:end] = of
    return laid
