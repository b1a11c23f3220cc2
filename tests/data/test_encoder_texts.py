"""Promises of encoded texts: the tokenizer's own ids, cut where too long and counted, laid out alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from halfbyte.data.encoder_texts import Text, collate_encoded, encode
from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.tokenizer import load_tokenizer
from halfbyte.errors import DataError

SINGLE = Text("A quiet film.", None, "one", "rows:1")
PAIR = Text("It rains all day, and nobody minds.", "Wet.", "two", "rows:2")
LONG = Text("word " * 50, None, "three", "rows:3")
LONG_PAIR = Text("first " * 30, "second " * 9, "four", "rows:4")


@pytest.fixture(scope="module")
def tokenizer(shared: Callable[[str], Path]) -> PreTrainedTokenizerBase:
    return load_tokenizer(shared("models/all-MiniLM-L6-v2-fp16"))


def test_ids_are_those_of_the_tokenizer_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [PAIR, SINGLE, LONG, LONG_PAIR]
    for text, found in zip(texts, encode(texts, tokenizer, 20), strict=True):
        expected = tokenizer(text.first, text.second, truncation=True, max_length=20)
        assert found.input_ids.tolist() == expected["input_ids"]
        assert found.segments is not None
        assert found.segments.tolist() == expected["token_type_ids"]
        assert (found.id, found.where) == (text.id, text.where)
        assert found.truncated == (text in (LONG, LONG_PAIR))
        assert found.input_ids[-1] == tokenizer.sep_token_id  # what is cut still ends as it should
    assert set(encode([PAIR], tokenizer, 20)[0].segments.tolist()) == {0, 1}


def test_of_a_pair_the_longer_text_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    (found,) = encode([LONG_PAIR], tokenizer, 24)
    assert found.segments is not None
    assert len(found.input_ids) == 24
    assert (found.segments == 1).sum() == 10  # nine words and the end: whole


@pytest.mark.parametrize(("text", "length", "needed"), [(SINGLE, 2, 3), (PAIR, 4, 5)])
def test_no_room_for_a_text_is_refused(
    tokenizer: PreTrainedTokenizerBase, text: Text, length: int, needed: int
) -> None:
    with pytest.raises(DataError, match=rf"HB230[\s\S]*set data.max_length to {needed} or more"):
        encode([text], tokenizer, length)
    assert len(encode([text], tokenizer, needed)[0].input_ids) == needed


def test_batches_hold_segments_where_their_tokens_lie(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encode([PAIR, SINGLE], tokenizer, 20)
    packed, padded = collate_encoded(rows, None), collate_encoded(rows, 0)
    for batch in (packed, padded):
        assert batch.segments is not None
        assert batch.trained_tokens == 0
        for (row, begin, end), example in zip(batch.documents, rows, strict=True):
            assert np.array_equal(batch.segments[row, begin:end], example.segments)
    assert packed.is_packed
    assert padded.segments is not None
    assert padded.segments[1, len(rows[1].input_ids) :].sum() == 0


def test_the_digest_of_an_example_depends_on_all_that_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = encode(
        [PAIR, PAIR.__class__(PAIR.first, PAIR.second, "other label", PAIR.where)], tokenizer, 20
    )
    assert one.content != two.content
    assert one.content == encode([PAIR], tokenizer, 20)[0].content


def test_the_fingerprint_is_of_the_special_tokens_too(
    tokenizer: PreTrainedTokenizerBase, shared: Callable[[str], Path]
) -> None:
    own = Fingerprint.of_texts(tokenizer)
    assert own == Fingerprint.of_texts(load_tokenizer(shared("models/all-MiniLM-L6-v2-fp16")))
    other = load_tokenizer(shared("models/all-MiniLM-L6-v2-fp16"))
    other.backend_tokenizer.post_processor = None
    assert own.differences(Fingerprint.of_texts(other)) != []
