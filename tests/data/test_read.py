"""Reading rows: every layout, and every way a line can be wrong, named by line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.row import Message, Row
from halfbyte.errors import DataError

GOOD = b'{"prompt": "2+2=", "completion": "4"}'


def write(folder: Path, *lines: bytes, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_bytes(b"\n".join(lines))
    return file


def fault(*files: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(files)
    assert caught.value.code == "HB202"
    return str(caught.value)


def test_messages_become_turns(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", " Hello\n")]
    line = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], "source": "shop"}).encode()
    [row] = read_rows(write(tmp_path, line, b""))
    assert row.messages == tuple(Message(r, c) for r, c in turns)  # type: ignore[arg-type]
    assert (row.style, row.line, row.where) == ("chat", 1, f"{tmp_path / 'rows.jsonl'}:1")


def test_prompt_and_completion_become_two_turns_of_their_own_style(tmp_path: Path) -> None:
    [row] = read_rows(write(tmp_path, GOOD))
    assert row.messages == (Message("user", "2+2="), Message("assistant", "4"))
    assert row.style == "completion"


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    [row] = read_rows(write(tmp_path, '{"text": " Grüße 你好 🙂 "}'.encode()))
    assert (row.messages, row.text, row.style) == (None, " Grüße 你好 🙂 ", "text")


@pytest.mark.parametrize(
    ("given", "asked"),
    [('"input": "b", ', "a\n\nb"), ('"input": "", ', "a"), ('"input": null, ', "a"), ("", "a")],
)
def test_alpaca_columns_become_a_question_and_an_answer(tmp_path: Path, given: str, asked: str) -> None:
    [row] = read_rows(write(tmp_path, f'{{"instruction": "a", {given}"output": "c"}}'.encode()))
    assert row.messages == (Message("user", asked), Message("assistant", "c"))
    assert row.style == "chat"


def test_a_json_array_gives_each_object_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, b"[", GOOD + b",", b"", GOOD + b", " + GOOD, b"]", b"", name="rows.json")
    assert [row.line for row in read_rows(file)] == [2, 4, 4]


def test_the_real_alpaca_file_is_read_whole(shared: Callable[[str], Path]) -> None:
    file = shared("datasets/alpaca/alpaca_en_demo.json")
    rows = read_rows(file)
    lines = file.read_text(encoding="utf-8").split("\n")
    assert len(rows) == len(json.loads(file.read_bytes())) == 999
    assert all(lines[row.line - 1].strip() == "{" for row in rows)


def test_files_are_read_in_the_order_named_and_may_differ_in_layout(tmp_path: Path) -> None:
    a = write(tmp_path, b'{"text": "a"}', name="a.jsonl")
    b = write(tmp_path, GOOD, name="b.jsonl")
    assert [row.style for row in read_rows([b, a])] == ["completion", "text"]


def test_line_ends_of_other_systems_a_bom_and_line_separators_in_text_are_fine(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        b"\xef\xbb\xbf" + GOOD + b"\r",
        '{"prompt": "a\u2028b", "completion": "c"}\r'.encode(),
        b"\r",
    )
    assert [row.line for row in read_rows(file)] == [1, 2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty line"),
        (b"   ", "empty line"),
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b"nonsense", "not JSON: Expecting value at column 1"),
        (GOOD + GOOD, "not JSON: Extra data"),
        (b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' is given twice"),
        (b'{"prompt": "a", "completion": "b", "meta": {"x": 1, "x": 2}}', "key 'x' is given twice"),
        (b'{"prompt": "a\0", "completion": "b"}', "NUL byte at byte 14"),
        (b'{"prompt": "a\\u0000", "completion": "b"}', "column 'prompt': NUL character at 2"),
        (b'{"prompt": "a\xff", "completion": "b"}', "not UTF-8 at byte 14"),
        (
            b'{"prompt": "a\\ud800", "completion": "b"}',
            "column 'prompt': half a surrogate pair at character 2",
        ),
        (b'"text"', "got text, expected an object"),
        (b"[1]", "got an array, expected an object"),
        (b"null", "got null, expected an object"),
        (b'{"prompt": 3, "completion": "b"}', "column 'prompt': got a number, expected text"),
        (b'{"prompt": "a", "completion": null}', "column 'completion': got null, expected text"),
        (b'{"prompt": "a"}', "column 'completion' missing"),
        (b'{"text": "a"}', "column 'prompt', 'completion' missing for a prompt_completion row"),
        (b'{"prompt": "a", "completion": "b", "tools": [1]}', "column 'tools': tool 1: got a number"),
        (
            b'{"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}',
            "column 'tools': there is no conversation in which they could be called",
        ),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    said = fault(write(tmp_path, GOOD, line, GOOD))
    assert f"rows.jsonl:2: {reason}" in said or reason in said.split("rows.jsonl:2: ")[1]
    assert "1 bad line(s)" in said


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("[]", "got an empty array"),
        ('"hi"', "got text, expected messages"),
        ('["hi"]', "message 1: got text, expected an object"),
        ('[{"role": "user"}]', "message 1: got keys 'role', expected role and content alone"),
        ('[{"role": "user", "content": "a", "tool_calls": []}]', "expected role and content alone"),
        ('[{"role": "user", "content": null}]', "message 1: 'content': got null, expected text"),
        (
            '[{"role": "usr", "content": "a"}]',
            "unknown role 'usr', expected system, user, assistant, tool; did you mean 'user'",
        ),
        ('[{"role": "gpt", "content": "a"}]', "did you mean 'assistant'"),
        ('[{"role": "xyz", "content": "a"}]', "unknown role 'xyz'"),
    ],
)
def test_a_bad_message_is_named_with_its_reason(tmp_path: Path, messages: str, reason: str) -> None:
    assert reason in fault(write(tmp_path, f'{{"messages": {messages}}}'.encode()))


def test_all_bad_lines_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    a = write(tmp_path, GOOD, b"", b"x", GOOD, name="a.jsonl")
    b = write(tmp_path, b'{"text": 1}', b'{"text": "fine"}', GOOD, name="b.jsonl")
    c = write(
        tmp_path,
        b"[" + GOOD + b",",
        b'{"prompt": 1, "completion": "a"},',
        b'{"a":1, "a":2},',
        b"7]",
        name="c.json",
    )
    said = fault(a, b, c)
    for where in ("a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "b.jsonl:3", "c.json:2", "c.json:3", "c.json:4"):
        assert where in said
    assert "7 bad line(s)" in said


def test_very_many_bad_lines_are_counted_and_the_first_20_shown(tmp_path: Path) -> None:
    said = fault(write(tmp_path, GOOD, *[b"x"] * 500))
    assert "500 bad line(s)" in said
    assert "and 480 more" in said
    assert said.count("rows.jsonl:") == 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b'{"a": 1}',
            "rows.json:1: expected a JSON array of objects; rows one to a line belong in a .jsonl file",
        ),
        (b"\n[\n{]", "rows.json:3: not JSON"),
        (b"[" + GOOD + b"\n" + GOOD + b"]", "expected a comma or the closing bracket"),
        (b"[" + GOOD, "expected a comma or the closing bracket"),
        (b"[" + GOOD + b",]", "a comma before the closing bracket"),
        (b"[" + GOOD + b"] x", "something follows the array"),
        (b"[]", "rows.json:1: the file holds no rows"),
        (b"[\n\xff]", "not UTF-8 at byte 3"),
        (b"[\n\0]", "NUL byte at byte 3"),
        (b"", "expected a JSON array"),
    ],
)
def test_a_broken_json_array_is_named_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in fault(write(tmp_path, content, name="rows.json"))


@pytest.mark.parametrize("content", [b"", b"\n\n", b" "])
def test_an_empty_file_is_a_fault(tmp_path: Path, content: bytes) -> None:
    assert "rows.jsonl:1: the file holds no rows" in fault(write(tmp_path, content))


def test_columns_that_fit_two_formats_must_be_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path, b'{"prompt": "a", "completion": "b", "text": "c"}')
    assert "columns fit prompt_completion and text; set data.format" in fault(file)
    assert read_rows(file, "text")[0].text == "c"


def test_columns_that_fit_no_format_are_named_beside_those_that_would(tmp_path: Path) -> None:
    said = fault(write(tmp_path, b'{"question": "a"}', b"{}"))
    assert "columns 'question' fit no format (messages: messages; sharegpt: conversations;" in said
    assert "preference: prompt, chosen, rejected; kto: prompt, completion, label;" in said
    assert "columns none fit no format" in said


def test_a_named_format_is_required_of_every_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'messages' missing for a messages row"):
        read_rows(write(tmp_path, GOOD), "messages")


def test_files_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows([tmp_path / "none.jsonl", tmp_path, write(tmp_path, b"a,b", name="rows.xls")])
    assert caught.value.code == "HB201"
    for reason in (
        "none.jsonl: does not exist",
        "is a folder without a file of rows, expected .jsonl, .json, .csv, .tsv, .parquet or .txt",
        "ends in '.xls', expected .jsonl, .json, .csv, .tsv, .parquet or .txt",
    ):
        assert reason in str(caught.value)
    with pytest.raises(DataError, match="no file is named"):
        read_rows([])


def test_the_id_is_the_words_alone() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"))
    row = Row(turns, None, "a.jsonl", 1)
    assert row.id == Row(turns, None, "b.jsonl", 7, "completion").id
    assert len(row.id) == 16
    others = [
        Row((Message("user", "ab"), Message("assistant", "")), None, "a", 1),
        Row((Message("system", "a"), Message("assistant", "b")), None, "a", 1),
        Row(None, "ab", "a", 1, "text"),
        Row(None, '[["user","a"],["assistant","b"]]', "a", 1, "text"),
    ]
    assert len({row.id, *(other.id for other in others)}) == 5


def test_as_many_bad_lines_as_allowed_are_skipped_and_one_more_is_an_error(tmp_path: Path) -> None:
    a = write(tmp_path, GOOD, b"", b"x", GOOD, name="a.jsonl")
    b = write(tmp_path, GOOD, b'{"prompt": 1, "completion": "a"}', name="b.jsonl")
    reading = Reading(allowed=3)
    assert [(row.source, row.line) for row in read_rows([a, b], reading=reading)] == [
        (str(a), 1),
        (str(a), 4),
        (str(b), 1),
    ]
    listed = [json.loads(line) for line in reading.as_json_lines().splitlines()]
    assert [(fault["file"], fault["line"]) for fault in listed] == [(str(a), 2), (str(a), 3), (str(b), 2)]
    assert listed[2]["reason"] == "column 'prompt': got a number, expected text"
    with pytest.raises(DataError) as caught:
        read_rows([a, b], reading=Reading(allowed=2))
    assert caught.value.code == "HB202"
    said = str(caught.value)
    assert "3 bad line(s); 2 may be skipped in all" in said
    assert all(where in said for where in ("a.jsonl:2:", "a.jsonl:3:", "b.jsonl:2:"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[" + GOOD + b", " + GOOD[:-3]),
        ("a.json", b"[]"),
        ("a.jsonl", b""),
        ("a.csv", b'prompt,completion\na,b\n"c,d\ne,f\n'),
        ("a.csv", b"question,answer\na,b\n"),
    ],
)
def test_what_may_hide_rows_behind_it_is_never_skipped(tmp_path: Path, name: str, content: bytes) -> None:
    file = write(tmp_path, content, name=name)
    with pytest.raises(DataError, match="may hide rows and are never skipped; 100 may be skipped in all"):
        read_rows(file, reading=Reading(allowed=100))
