"""Promises of prompts and answers: each side whole, ended, cut with counts, refused where nothing can be learnt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.model.seq2seq_families import tokenizer

from halfbyte.data.check import check_rows
from halfbyte.data.pack import UNTRAINED
from halfbyte.data.read import read_rows
from halfbyte.data.row import Row
from halfbyte.data.seq2seq import Pairs, PromptWriter, Seq2SeqExample, collate_seq2seq, encode_pairs
from halfbyte.errors import DataError

START = 0
EOS = 1


def rows(tmp_path: Path, *written: dict[str, object]) -> list[Row]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return list(check_rows(read_rows(file)).rows)


def encoded(found: list[Row], template: str = "auto", max_length: int = 64, **more: float) -> Pairs:
    return encode_pairs(found, PromptWriter(tokenizer(), template), START, max_length, **more)  # type: ignore[arg-type]


def texts(example: Seq2SeqExample) -> tuple[str, str]:
    """What is read and what is trained, end tokens and all."""
    (source, _), (target, trained) = example.sides
    assert trained.all()
    return tokenizer().decode(source), tokenizer().decode(target)


def test_all_three_layouts_give_the_same_two_texts(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        {"prompt": "translate: house", "completion": "Haus"},
    )
    found += rows(tmp_path, {"instruction": "translate: house", "input": "", "output": "Haus"})
    turns = [{"role": "user", "content": "translate: house"}, {"role": "assistant", "content": "Haus"}]
    found += rows(tmp_path, {"messages": turns})
    examples = encoded(found).examples
    assert texts(examples[0]) == ("translate: house</s>", "Haus</s>")
    assert texts(examples[2]) == texts(examples[0])
    assert texts(examples[1])[1] == "Haus</s>"
    assert "translate: house" in texts(examples[1])[0]


def test_the_arrays_are_what_the_tokenizer_itself_gives(tmp_path: Path) -> None:
    example = encoded(rows(tmp_path, {"prompt": "ab cd", "completion": "dc ba"})).examples[0]
    own = tokenizer()
    assert example.source.tolist() == own("ab cd").input_ids
    assert example.input_ids.tolist() == [START, *own(text_target="dc ba").input_ids]
    assert example.trained.tolist() == [False] + [True] * (len(example.input_ids) - 1)
    assert example.input_ids[-1] == EOS
    assert example.tokens == len(example.source) + len(example.input_ids)


def test_an_answer_that_ends_itself_is_not_ended_twice(tmp_path: Path) -> None:
    example = encoded(rows(tmp_path, {"prompt": "a", "completion": "b</s>"})).examples[0]
    assert example.input_ids.tolist().count(EOS) == 1
    assert example.answer == "b"


def test_a_tokenizer_that_begins_texts_begins_both_sides(tmp_path: Path) -> None:
    own = tokenizer(bos=True)
    found = encode_pairs(rows(tmp_path, {"prompt": "ab", "completion": "ba"}), PromptWriter(own), 1, 64)
    example = found.examples[0]
    assert example.source.tolist() == own("ab").input_ids
    assert example.input_ids.tolist() == [1, *own("ba").input_ids]


def test_a_template_that_is_set_writes_the_prompt_and_not_the_answer(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    more = [*turns, {"role": "user", "content": "cd"}, {"role": "assistant", "content": "dc"}]
    examples = encoded(rows(tmp_path, {"messages": turns}, {"messages": more}), "plain").examples
    assert texts(examples[0]) == ("### Request ab  ### Reply</s>", "ba</s>")
    assert texts(examples[1])[0].count("### Reply") == 2
    assert texts(examples[1])[1] == "dc</s>"


def test_the_tokenizers_own_template_is_used_where_it_has_one(tmp_path: Path) -> None:
    own = tokenizer()
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ba"}]
    writer = PromptWriter(own)
    assert writer.template == "tokenizer"
    assert writer.write(rows(tmp_path, {"messages": turns})[0]) == ("user: ab assistant: ", "ba")
    assert writer.fingerprint != PromptWriter(tokenizer()).fingerprint


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
TOOL_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(
    ("row", "code", "named"),
    [
        ({"text": "only a text"}, "HB245", "a text"),
        ({"messages": TURNS}, "HB245", "several answers"),
        ({"messages": TOOL_TURNS}, "HB245", "tools"),
        ({"messages": [*TURNS[:1], {"role": "assistant", "content": "b</s>c"}]}, "HB210", "</s>"),
        ({"prompt": "a", "completion": "{}"}, "HB247", "of 2 tokens"),
    ],
)
def test_what_cannot_be_learnt_is_refused_by_name(
    tmp_path: Path, row: dict[str, object], code: str, named: str
) -> None:
    found = rows(tmp_path, {"prompt": "a", "completion": "b"})
    found += rows(tmp_path, row)
    with pytest.raises(DataError) as caught:
        encoded(found)
    assert caught.value.code == code
    assert "rows.jsonl:1" in caught.value.what
    assert named in caught.value.what
    assert caught.value.fix


def test_an_answer_of_which_the_tokenizer_leaves_nothing_is_refused(tmp_path: Path) -> None:
    found = rows(tmp_path, {"prompt": "a", "completion": "</s>"})  # not blank, but nothing beside the end
    with pytest.raises(DataError) as caught:
        encoded(found)
    assert caught.value.code == "HB246"
    assert "rows.jsonl:1" in caught.value.what


def test_a_long_prompt_keeps_its_end_and_a_long_answer_is_not_taught_to_stop(tmp_path: Path) -> None:
    found = rows(
        tmp_path, {"prompt": "abcdefgh", "completion": "ab"}, {"prompt": "ab", "completion": "abcdefgh"}
    )
    pairs = encoded(found, max_length=6)
    assert pairs.cut == 2
    assert all(example.longest <= 7 for example in pairs.examples)  # six tokens, and the decoder's start
    assert texts(pairs.examples[0]) == ("abcd</s>", "ab</s>")
    assert texts(pairs.examples[1]) == ("ab</s>", "abcde")
    with pytest.raises(DataError) as caught:
        encoded(found, max_length=6, max_truncated=0.05)
    assert caught.value.code == "HB221"
    with pytest.raises(DataError) as caught:
        encoded(found, max_length=1)
    assert caught.value.code == "HB230"


def test_what_the_tokenizer_does_not_give_back_is_counted(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        {"prompt": "a{b}", "completion": "one two"},
        {"prompt": "ab", "completion": "one\ntwo"},
        {"prompt": "ab", "completion": "three"},
    )
    pairs = encoded(found)
    assert (pairs.unread, pairs.altered) == (1, 1)


def test_padding_is_told_by_masks_even_where_its_id_is_a_token(tmp_path: Path) -> None:
    found = rows(tmp_path, {"prompt": "abc", "completion": "c"}, {"prompt": "a", "completion": "abcd"})
    batch = collate_seq2seq(encoded(found).examples, pad_id=START)
    assert batch.source_mask.sum(1).tolist() == [5, 3]
    assert batch.attention_mask.sum(1).tolist() == [4, 7]  # the start has the padding's id and is not masked
    assert (batch.input_ids[:, 0] == START).all()
    assert (batch.labels[:, 0] == UNTRAINED).all()
    assert batch.trained_tokens == 3 + 6
    assert batch.tokens == 5 + 3 + 4 + 7
    assert not batch.is_packed


def test_the_digest_of_rows_tells_prompts_apart(tmp_path: Path) -> None:
    one, other = (encoded(rows(tmp_path, {"prompt": p, "completion": "b"})) for p in ("a", "c"))
    assert np.array_equal(one.examples[0].input_ids, other.examples[0].input_ids)
    assert one.listed.sha256 != other.listed.sha256
