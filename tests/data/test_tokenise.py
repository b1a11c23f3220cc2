"""Tokenising: masks compared with hand-written strings on real tokenizers, BOS, truncation, stop tokens."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.render import Rendered, Renderer
from halfbyte.data.row import Row
from halfbyte.data.tokenise import ROWS_AT_ONCE, Example, stop_token_ids, tokenise, tokenise_rows
from halfbyte.data.tokenizer import load_tokenizer, padding_id
from halfbyte.errors import DataError

Make = Callable[..., Row]
Tokenizers = Callable[[str], Any]
Templated = Callable[[str, str], Any]
LONG = 10_000


def one(row: Row, tokenizer: Any, max_length: int = LONG) -> Example:
    return tokenise(Renderer(tokenizer).render(row), tokenizer, max_length)


def pieces(ids: Any, tokenizer: Any) -> str:
    """The text of some tokens, with every blank that `decode` would drop."""
    if tokenizer.convert_tokens_to_ids("▁") in (None, tokenizer.unk_token_id):
        return str(tokenizer.decode(ids))
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").replace("<0x0A>", "\n")


def learnt(example: Example, tokenizer: Any) -> list[str]:
    """The text of each run of trained tokens."""
    runs = groupby(zip(example.trained, example.input_ids, strict=True), key=lambda pair: pair[0])
    return [pieces([int(i) for _, i in run], tokenizer) for trained, run in runs if trained]


@pytest.mark.parametrize("template", ["none", "chatml", "llama2"])
def test_trained_tokens_are_the_answers_and_their_stop_tokens(
    tokenizers: Tokenizers, templated: Templated, chat: Make, template: str
) -> None:
    tokenizer = tokenizers("base-11m") if template == "none" else templated("base-11m", template)
    expected = ["Hello there!<|im_end|>", "1, 2\nand\t3. é🙂<|im_end|>"]
    if template == "llama2":
        tokenizer.bos_token = "<|pad|>"
        expected = [" Hello there! <|endoftext|>", " 1, 2\nand\t3. é🙂 <|endoftext|>"]
    example = one(chat("Hi", "Hello there!", "Count.", "1, 2\nand\t3. é🙂"), tokenizer)
    assert learnt(example, tokenizer) == expected
    assert example.aligned
    assert not example.truncated


@pytest.mark.parametrize("name", ["llama2-tokenizer", "stories260K-hf"])
def test_trained_tokens_are_the_answers_in_sentencepiece_vocabularies(
    tokenizers: Tokenizers, templated: Templated, chat: Make, name: str
) -> None:
    row = chat("Hi", "Hello there!", "More.", "One.\n\nTwo.")
    plain, own = tokenizers(name), templated(name, "llama2")
    assert learnt(one(row, plain), plain) == ["Hello there!</s>", "One.\n\nTwo.</s>"]
    assert learnt(one(row, own), own) == [" Hello there! </s>", " One.\n\nTwo. </s>"]
    assert one(row, plain).aligned
    assert one(row, own).aligned


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("base-11m", "chatml"),
        ("base-11m", "plain"),
        ("llama2-tokenizer", "plain"),
        ("stories260K-hf", "plain"),
    ],
)
def test_any_answer_is_learnt_to_the_character(
    tokenizers: Tokenizers, chat: Make, name: str, template: Any
) -> None:
    tokenizer = tokenizers(name)
    renderer = Renderer(tokenizer, template)
    dice = random.Random(0)
    parts = [
        "a",
        "Zoë",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "12",
        "你好",
        "🙂",
        "...",
        "'s",
        "#",
        "def f(x):",
        "<",
        "|",
    ]
    rows = [chat(*("".join(dice.choices(parts, k=dice.randint(1, 8))) for _ in range(4))) for _ in range(300)]
    found = tokenise_rows(rows, renderer, LONG)
    for row, example in zip(rows, found.examples, strict=True):
        assert_mask_follows_the_rule(renderer.render(row), example, tokenizer)
    begins_black = [not (example.answer or " ")[0].isspace() for example in found.examples]
    assert 100 < sum(begins_black) < 300
    assert all(example.aligned for example, black in zip(found.examples, begins_black, strict=True) if black)


def assert_mask_follows_the_rule(rendered: Rendered, example: Example, tokenizer: Any) -> None:
    """The mask by transformers' own call and a loop over characters, apart from the code under test."""
    plain = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    covered = {at for begin, end in rendered.trained for at in range(begin, end)}
    bos = len(example.input_ids) - len(plain["input_ids"])
    assert bos in (0, 1)
    assert example.input_ids[bos:].tolist() == plain["input_ids"]
    assert example.trained.tolist() == [False] * bos + [
        begin in covered for begin, _ in plain["offset_mapping"]
    ]


def test_a_token_that_begins_in_the_prompt_is_not_trained(tokenizers: Tokenizers, completion: Make) -> None:
    tokenizer = tokenizers("base-11m")
    straddling = one(completion("Which words? ", "the end"), tokenizer)
    clean = one(completion("Which words?", " the end"), tokenizer)
    assert straddling.input_ids.tolist() == clean.input_ids.tolist()
    assert learnt(straddling, tokenizer) == [" end<|endoftext|>"]
    assert learnt(clean, tokenizer) == [" the end<|endoftext|>"]
    assert (straddling.aligned, clean.aligned) == (False, True)
    rows = [completion("Which words? ", "the end"), completion("Which words?", " the end")]
    assert tokenise_rows(rows, Renderer(tokenizer), LONG).misaligned == 1


def test_offsets_that_a_post_processor_trims_do_not_shift_the_mask(
    templated: Templated, completion: Make
) -> None:
    tokenizer = templated("base-11m", "chatml")
    text = "Which words? the end"
    exact = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer(text, return_offsets_mapping=True)["offset_mapping"] != exact
    assert learnt(one(completion("Which words? ", "the end"), tokenizer), tokenizer) == [" end<|endoftext|>"]
    assert learnt(one(completion("a\n", "b"), tokenizer), tokenizer) == ["b<|endoftext|>"]


def test_bos_comes_exactly_once(
    tokenizers: Tokenizers, templated: Templated, chat: Make, completion: Make
) -> None:
    adds, own = tokenizers("llama2-tokenizer"), templated("llama2-tokenizer", "llama2")
    rows = [
        (completion("a", "b"), adds),
        (completion("<s>a", "b"), adds),
        (chat("a", "b"), adds),
        (chat("a", "b"), own),
        (Row(None, "a", "rows.jsonl", 1, "text"), adds),
        (Row(None, "<s>a</s>", "rows.jsonl", 1, "text"), adds),
    ]
    for row, tokenizer in rows:
        example = one(row, tokenizer)
        assert example.input_ids.tolist().count(1) == 1
        assert example.input_ids[0] == 1
        if example.prompt_ids is not None:
            assert example.prompt_ids.tolist().count(1) == 1
            assert example.prompt_ids[0] == 1


def test_a_tokenizer_without_bos_gets_none(tokenizers: Tokenizers, completion: Make) -> None:
    example = one(completion("a", "b"), tokenizers("base-11m"))
    assert tokenizers("base-11m").decode(example.input_ids) == "ab<|endoftext|>"


def test_the_prompt_is_what_the_example_begins_with(tokenizers: Tokenizers, chat: Make) -> None:
    tokenizer = tokenizers("base-11m")
    example = one(chat("Hi", "Hello", "And?", "Bye"), tokenizer)
    assert example.prompt_ids is not None
    assert tokenizer.decode(example.prompt_ids).endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    assert example.input_ids[: len(example.prompt_ids)].tolist() == example.prompt_ids.tolist()
    assert example.answer == "Bye"
    text = one(Row(None, "Once.", "rows.jsonl", 1, "text"), tokenizer)
    assert text.prompt_ids is None
    assert text.answer is None
    assert text.trained.all()


def test_arrays_have_the_promised_types(tokenizers: Tokenizers, chat: Make) -> None:
    example = one(chat("Hi", "Hello"), tokenizers("base-11m"))
    assert example.input_ids.dtype == np.int32
    assert example.trained.dtype == np.bool_
    assert example.prompt_ids is not None
    assert example.prompt_ids.dtype == np.int32


def test_truncation_cuts_the_end_and_is_counted(tokenizers: Tokenizers, chat: Make) -> None:
    tokenizer = tokenizers("base-11m")
    rows = [chat("Hi", "Hello"), chat("Hi", "Hello " * 100)]
    whole = tokenise_rows(rows, Renderer(tokenizer), LONG)
    cut = tokenise_rows(rows, Renderer(tokenizer), 40)
    assert (whole.truncated, cut.truncated) == (0, 1)
    assert [e.truncated for e in cut.examples] == [False, True]
    assert cut.examples[1].input_ids.tolist() == whole.examples[1].input_ids[:40].tolist()
    assert cut.examples[1].trained.tolist() == whole.examples[1].trained[:40].tolist()
    assert tokenise_rows(rows[:1], Renderer(tokenizer), len(whole.examples[0].input_ids)).truncated == 0


def test_all_rows_that_truncation_leaves_nothing_to_learn_are_named(
    tokenizers: Tokenizers, chat: Make
) -> None:
    rows = [chat("Hi", "Hello", line=1), chat("Hi " * 50, "Hello", line=2), chat("Hi " * 60, "Hello", line=3)]
    with pytest.raises(DataError) as caught:
        tokenise_rows(rows, Renderer(tokenizers("base-11m")), 20)
    said = str(caught.value)
    assert caught.value.code == "HB208"
    assert "2 of 3 rows have no trained token among their first 20" in said
    first = int(said.split("rows.jsonl:2: its first trained token is number ")[1].split(",", maxsplit=1)[0])
    kept = tokenise_rows(rows[1:2], Renderer(tokenizers("base-11m")), first).examples[0]
    assert kept.trained_tokens == 1
    assert "rows.jsonl:3" in said


def test_rows_of_one_place_stay_or_go_together(tokenizers: Tokenizers, chat: Make) -> None:
    """As the two answers of a pair do, of which only one has nothing to learn."""
    rows = [chat("Hi", "Yes", line=1), chat("Hi " * 50, "No", line=1), chat("Hi", "Yes", line=2)]
    for given in (rows, [rows[1], rows[0], rows[2]]):
        reading = Reading(1)
        found = tokenise_rows(given, Renderer(tokenizers("base-11m")), 30, reading=reading)
        assert [example.where for example in found.examples] == ["rows.jsonl:2"]
        assert [fault.line for fault in reading.skipped] == [1]


def test_a_first_token_alone_is_nothing_to_learn(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers("base-11m")
    row = Row(None, "<|endoftext|>", "rows.jsonl", 1, "text")
    with pytest.raises(DataError, match=r"HB208.*\n.*rows\.jsonl:1: it has no trained token at any length"):
        one(row, tokenizer)


def test_a_stop_token_the_tokenizer_breaks_up_is_refused(tokenizers: Tokenizers) -> None:
    text = "### Reply\nyes<|endoftext|>x"
    rendered = Rendered(
        text, ((10, len(text)),), ("<|endoftext|>",), "### Reply\n", "yes", "rows.jsonl:7", "0"
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the tokenizer does not keep") as caught:
        tokenise(rendered, tokenizers("base-11m"), LONG)
    assert caught.value.code == "HB207"


@pytest.mark.parametrize("name", ["base-11m", "llama2-tokenizer", "stories260K-hf"])
def test_every_answer_of_the_real_alpaca_rows_ends_with_a_trained_stop_token(
    tokenizers: Tokenizers, shared: Callable[[str], Path], name: str
) -> None:
    rows = read_rows(shared("datasets/alpaca/alpaca_en_demo.json"))[:300]
    tokenizer = tokenizers(name)
    found = tokenise_rows(rows, Renderer(tokenizer), LONG)
    assert [e.id for e in found.examples] == [row.id for row in rows]
    assert all(e.trained[-1] and e.input_ids[-1] in found.stop_ids for e in found.examples)
    assert (found.truncated, found.misaligned) == (0, 0)
    for row, example in zip(rows, found.examples, strict=True):
        [text] = learnt(example, tokenizer)
        stop = tokenizer.convert_ids_to_tokens(int(example.input_ids[-1]))
        if text.isascii() and "<0x" not in text:
            assert text == row.messages[-1].content + stop  # type: ignore[index]


def test_many_rows_give_the_same_examples_as_one_by_one(tokenizers: Tokenizers, completion: Make) -> None:
    tokenizer = tokenizers("stories260K-hf")
    rows = [completion(f"{n}+1=", f" {n + 1}") for n in range(ROWS_AT_ONCE + 3)]
    renderer = Renderer(tokenizer)
    found = tokenise_rows(rows, renderer, LONG).examples
    assert len(found) == len(rows)
    for at in (0, 1, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 2):
        alone = tokenise(renderer.render(rows[at]), tokenizer, LONG)
        assert found[at].input_ids.tolist() == alone.input_ids.tolist()
        assert found[at].trained.tolist() == alone.trained.tolist()
        assert found[at].answer == f" {at + 1}"


def test_stop_ids_are_those_the_rows_teach(
    tokenizers: Tokenizers, templated: Templated, chat: Make, completion: Make
) -> None:
    base, llama2 = tokenizers("base-11m"), templated("llama2-tokenizer", "llama2")
    assert stop_token_ids(Renderer(base)) == (0, 2)
    assert stop_token_ids(Renderer(llama2)) == (2,)
    assert tokenise_rows([chat("a", "b")], Renderer(base), LONG).stop_ids == (0, 2)
    assert tokenise_rows([completion("a", "b")], Renderer(base), LONG).stop_ids == (0,)
    with pytest.raises(DataError, match="HB206"):
        stop_token_ids(Renderer(templated("base-11m", "{% for %}")))


def test_filling_needs_no_pad_token(tokenizers: Tokenizers) -> None:
    assert [padding_id(tokenizers(n)) for n in ("base-11m", "llama2-tokenizer")] == [3, 2]


def test_a_tokenizer_without_offsets_is_refused(tokenizers: Tokenizers) -> None:
    class Slow:
        is_fast = False

    rendered = Rendered("ab", ((1, 2),), ("b",), "a", "b", "rows.jsonl:1", "0")
    with pytest.raises(DataError, match=r"HB209.*Slow does not say"):
        tokenise(rendered, Slow(), LONG)  # type: ignore[arg-type]


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, shared: Callable[[str], Path]) -> None:
    for folder in (tmp_path, tmp_path / "none", shared("models/capp-gpt-hf")):
        with pytest.raises(DataError, match=r"HB209.*no tokenizer found"):
            load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("config.json", {"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}),
    ],
)
def test_a_tokenizer_that_brings_its_own_code_is_refused(
    tmp_path: Path, shared: Callable[[str], Path], file: str, settings: dict[str, object]
) -> None:
    shutil.copy(shared("models/stories260K-hf/tokenizer.json"), tmp_path / "tokenizer.json")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"HB209.*asks for its own code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{")])
def test_a_broken_tokenizer_is_refused(
    tmp_path: Path, shared: Callable[[str], Path], file: str, content: str
) -> None:
    shutil.copy(shared("models/stories260K-hf/tokenizer.json"), tmp_path / "tokenizer.json")
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match="HB209"):
        load_tokenizer(tmp_path)


def test_the_data_path_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, halfbyte.data.order, halfbyte.data.pack; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_text_that_begins_twice_is_refused(templated: Templated, chat: Make) -> None:
    """The template's own BOS is not the first character, so that the tokenizer's comes before it."""
    template = (
        "\n{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = templated("llama2-tokenizer", template)
    rows = [chat("Hi", "Hello", line=1), chat("a", "b", "c", "d", line=2)]
    with pytest.raises(DataError) as caught:
        tokenise_rows(rows, Renderer(tokenizer), LONG)
    assert caught.value.code == "HB220"
    assert "2 of 2 rows" in caught.value.what
    assert "rows.jsonl:2: the text begins at token 1 and again at token" in caught.value.what
    tokenizer.chat_template = template.removeprefix("\n")
    bos = tokenizer.bos_token_id
    for example in tokenise_rows(rows, Renderer(tokenizer), LONG).examples:
        assert example.input_ids.tolist().count(bos) == 1
    tokenizer.chat_template = template.replace("{{ bos_token }}", "{{ bos_token * 2 }}").removeprefix("\n")
    with pytest.raises(DataError, match="begins at token 1 and again at token 2"):
        tokenise_rows(rows, Renderer(tokenizer), LONG)


def test_a_text_may_begin_again_once_it_has_ended(templated: Templated, chat: Make, completion: Make) -> None:
    tokenizer = templated("llama2-tokenizer", "llama2")
    rows = [chat("a", "b", "c", "d"), completion("<s>1+1=2</s><s>2+2=", "4")]
    found = tokenise_rows(rows, Renderer(tokenizer), LONG).examples
    assert [example.input_ids.tolist().count(tokenizer.bos_token_id) for example in found] == [2, 2]


def test_more_cut_rows_than_allowed_are_refused_and_named(tokenizers: Tokenizers, completion: Make) -> None:
    rows = [completion(f"Row {n}:", " yes" * (40 if n % 4 == 0 else 1)) for n in range(20)]
    renderer = Renderer(tokenizers("base-11m"))
    assert tokenise_rows(rows, renderer, 20, max_truncated=0.25).truncated == 5
    assert tokenise_rows(rows, renderer, LONG, max_truncated=0.0).truncated == 0
    with pytest.raises(DataError) as caught:
        tokenise_rows(rows, renderer, 20, max_truncated=0.24)
    assert caught.value.code == "HB221"
    longest = max(len(e.input_ids) for e in tokenise_rows(rows, renderer, LONG).examples)
    assert "5 of 20 rows have more than 20 tokens, expected at most 24.0% of them" in caught.value.what
    assert caught.value.what.count("rows.jsonl:1: ") == 5
    assert f"the longest row has {longest} tokens" in caught.value.fix
