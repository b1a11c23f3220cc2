"""Batches: where each document lies, what it is asked for, and nothing of its neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.data.pack import UNTRAINED, Batch, collate, pack
from halfbyte.data.tokenise import Example


def example(name: str, ids: list[int], trained: list[int]) -> Example:
    mask = np.array(trained, np.bool_)
    return Example(np.array(ids, np.int32), mask, None, None, name, f"rows.jsonl:{name}", truncated=False)


A, B = example("a", [5, 6, 7], [0, 1, 1]), example("b", [8, 9], [1, 1])


def random_examples(seed: int) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        example(str(n), random.integers(0, 50, t).tolist(), random.integers(0, 2, t).tolist())
        for n, t in enumerate(random.integers(1, 9, int(random.integers(1, 12))).tolist())
    ]


def document(batch: Batch, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of one document."""
    row, begin, end = batch.documents[number]
    return batch.input_ids[row, begin:end], batch.labels[row, begin:end]


def asked_across(labels: np.ndarray, cu_seqlens: np.ndarray) -> list[int]:
    """Tokens that are to be predicted from another document's last token."""
    return [int(begin) for begin in cu_seqlens[1:-1] if labels[0, begin] != UNTRAINED]


def test_a_packed_batch_lies_end_to_end() -> None:
    batch = pack([A, B])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9]]
    assert batch.documents.tolist() == [[0, 0, 3], [0, 3, 5]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask.tolist() == [[1] * 5]
    assert batch.ids == ("a", "b")
    assert batch.is_packed


def test_a_padded_batch_is_filled_at_the_right_and_masked() -> None:
    batch = collate([A, B], pad_id=6)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 6]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert batch.documents.tolist() == [[0, 0, 3], [1, 0, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.ids == ("a", "b")
    assert not batch.is_packed


def test_a_single_document_is_the_same_either_way() -> None:
    packed, padded = pack([A]), collate([A], pad_id=0)
    for name in ("input_ids", "labels", "documents"):
        assert getattr(packed, name).tolist() == getattr(padded, name).tolist()
    assert not packed.is_packed


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_whole_and_counts_the_same_either_way(seed: int) -> None:
    examples = random_examples(seed)
    for batch in (pack(examples), collate(examples, pad_id=0)):
        assert {batch.input_ids.dtype, batch.labels.dtype} == {np.dtype(np.int64)}
        assert {batch.position_ids.dtype, batch.attention_mask.dtype} == {np.dtype(np.int64)}
        assert batch.documents.dtype == np.int32
        assert batch.input_ids.shape == batch.labels.shape
        assert batch.ids == tuple(e.id for e in examples)
        for number, one in enumerate(examples):
            ids, labels = document(batch, number)
            assert ids.tolist() == one.input_ids.tolist()
            assert labels[0] == UNTRAINED
            assert ((labels != UNTRAINED)[1:] == one.trained[1:]).all()
            assert (labels == ids)[labels != UNTRAINED].all()
        assert batch.lengths.tolist() == [len(e.input_ids) for e in examples]
        assert batch.tokens == batch.attention_mask.sum() == sum(len(e.input_ids) for e in examples)
        assert batch.trained_tokens == sum(e.trained_tokens for e in examples)
        assert batch.trained_tokens == (batch.labels[:, 1:] != UNTRAINED).sum()  # what shifting leaves
    packed = pack(examples)
    assert packed.cu_seqlens.dtype == np.int32
    assert packed.cu_seqlens.tolist() == [0, *np.cumsum(packed.lengths).tolist()]
    assert (packed.position_ids[0, packed.cu_seqlens[:-1]] == 0).all()
    assert packed.tokens == packed.input_ids.size, "nothing is padded"


@pytest.mark.parametrize("seed", range(20))
def test_no_document_is_asked_for_the_next_one_s_first_token(seed: int) -> None:
    packed = pack(random_examples(seed))
    assert asked_across(packed.labels, packed.cu_seqlens) == []


def test_labels_that_cross_documents_would_be_seen() -> None:
    """The planted bug: labels as tokenised, which for text rows train the first token too."""
    examples = [A, B, B]
    crossing = np.concatenate([np.where(e.trained, e.input_ids, UNTRAINED) for e in examples])[None]
    assert asked_across(crossing, pack(examples).cu_seqlens) == [3, 5]
