"""Files of every kind: what a row is in each, on which line it begins, and every way such a file can be broken."""

from __future__ import annotations

import csv
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tests.data.container_files import fault, found, write

from halfbyte.data import json_rows, lines
from halfbyte.data.containers import row_files
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows

ALPHABET = ['"', ",", "\t", "\n", "\r\n", " ", "a", "b;", "é", "🙂", "'", '""', "\u2028"]
"""Everything that a table's grammar or Python's idea of a line could stumble over."""


# Tables


def test_csv_cells_may_hold_commas_quotes_and_line_ends_and_lines_stay_exact(tmp_path: Path) -> None:
    table = '\ufeffprompt,completion,n\r\n"a\r\nb, ""c""",d,1\r\n e ,"\n\n",2\r\nlast,"",3'
    assert found(write(tmp_path, "a.csv", table)) == [
        (2, {"prompt": 'a\r\nb, "c"', "completion": "d", "n": "1"}),
        (4, {"prompt": " e ", "completion": "\n\n", "n": "2"}),
        (7, {"prompt": "last", "completion": "", "n": "3"}),
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_whatever_the_standard_writer_writes_is_read_as_it_was(
    tmp_path: Path, quoting: Any, line_end: str
) -> None:
    draw = random.Random(7)
    for _ in range(150):
        columns = draw.randint(1, 4)
        rows = [
            ["".join(draw.choices(ALPHABET, k=draw.randint(0, 6))) for _ in range(columns)]
            for _ in range(draw.randint(1, 8))
        ]
        header = [f"column {n}" for n in range(columns)]
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, quoting=quoting, lineterminator=line_end)
        writer.writerow(header)
        begins = []
        for row in rows:
            begins.append(buffer.getvalue().count("\n") + 1)
            writer.writerow(row)
        got = found(write(tmp_path, "a.csv", buffer.getvalue()))
        assert got == [
            (at, dict(zip(header, row, strict=True))) for at, row in zip(begins, rows, strict=True)
        ]


def test_a_tsv_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    draw = random.Random(11)
    refused = read = 0
    for _ in range(400):
        cells = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 3))) for _ in range(2)]
        if any("\t" in cell and "\n" in cell for cell in cells):
            continue
        buffer = io.StringIO(newline="")
        csv.writer(buffer, dialect="excel-tab").writerows([["a", "b"], cells])
        got = found(write(tmp_path, "a.tsv", buffer.getvalue()))
        if any(isinstance(value, str) for _, value in got):
            refused += 1
        else:
            assert got == [(2, dict(zip("ab", cells, strict=True)))]
            read += 1
    assert refused > 50
    assert read > 50


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    table = 'sentence\tlabel\n"Yes" he said\t1\n"No."\t0\n'
    rows = read_rows(write(tmp_path, "a.tsv", table))
    assert [(row.text, row.label, row.line) for row in rows] == [('"Yes" he said', 1, 2), ('"No."', 0, 3)]


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.csv", "text\na\nb,c\n", 3, "got 2 cells, expected 1: 'text'"),
        ("a.csv", "prompt,completion\na\n", 2, "got 1 cells, expected 2: 'prompt', 'completion'"),
        ("a.csv", "text\na\n\nb\n", 3, "empty line"),
        ("a.csv", 'text\na\n"b\nc\n', 3, "<a quote is opened and never closed>"),
        ("a.csv", 'text\na\n"b"c\n', 3, "<not CSV: ',' expected after '\"'>"),
        ("a.csv", b"text\na\nb\xff\n", 3, "<not UTF-8 at byte 2: invalid start byte>"),
        (
            "a.csv",
            b'text\na\n"b\n\xff"\n',
            3,
            "<line 4, within quotes: not UTF-8 at byte 1: invalid start byte>",
        ),
        ("a.csv", b"text\na\nb\0\n", 3, "<NUL byte at byte 2>"),
        ("a.csv", "text\na\nb\rc\n", 3, "<not CSV: new-line character seen in unquoted field"),
        ("a.csv", "text,,b\na,b,c\n", 1, "<column 2 has no name; expected the names of the columns"),
        ("a.csv", "text,b,text\na,b,c\n", 1, "<column 'text' is named twice; expected the names"),
        ("a.tsv", "text\na\nb\tc\n", 3, "got 2 cells, expected 1"),
        ("a.tsv", 'text\na\n"b ""c"""\n', 3, "cell 1 is quoted, which a .tsv file knows nothing of"),
        ("a.tsv", b"text\na\n\xff\n", 3, "not UTF-8 at byte 1"),
        ("a.tsv", b"te\0xt\na\n", 1, "<NUL byte at byte 3>"),
        ("a.txt", b"a\n\nb\0\n", 3, "NUL byte at byte 2"),
        ("a.txt", b"a\n\nb\xff\n", 3, "not UTF-8 at byte 2"),
    ],
)
def test_a_broken_row_is_named_with_its_line(
    tmp_path: Path, name: str, content: bytes | str, line: int, reason: str
) -> None:
    faults = [(at, value) for at, value in found(write(tmp_path, name, content)) if isinstance(value, str)]
    assert len(faults) == 1
    assert faults[0][0] == line
    assert faults[0][1].startswith(reason)


def test_a_cell_may_be_longer_than_the_csv_module_likes_and_the_module_is_left_as_it_was(
    tmp_path: Path,
) -> None:
    before = csv.field_size_limit()
    [row] = read_rows(write(tmp_path, "a.csv", "text\n" + "a" * 2 * before))
    assert len(row.text or "") == 2 * before
    assert csv.field_size_limit() == before


def test_a_table_without_a_heading_is_refused_once_and_shortly(tmp_path: Path) -> None:
    said = fault(write(tmp_path, "a.tsv", ("0\t" + "long " * 100 + "\t1\n") * 50))
    assert "1 bad line(s)" in said
    assert "a.tsv:2: columns '0', 'long long" in said
    assert "all rows of the file have these columns, named at its beginning" in said
    assert len(said) < 900


# Texts


def test_a_text_file_has_one_row_per_line_that_is_not_blank(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\ufeffone\r\n\n  \n two\u2028still two \n\ufefflast")
    assert [(row.line, row.text, row.style) for row in read_rows(file)] == [
        (1, "one", "text"),
        (4, " two\u2028still two ", "text"),
        (5, "\ufefflast", "text"),
    ]


# JSON


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_an_array_read_in_pieces_is_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    values = [{"text": "é🙂\n\\"}, 12, -3.5e2, True, None, [], {"a": {"b": [1, {"c": "]"}]}}, "x", 1234567]
    for indent in (None, 1):
        content = json.dumps(values, ensure_ascii=False, indent=indent)
        got = found(write(tmp_path, "a.json", "\ufeff" + content + "\n"))
        assert [value for _, value in got] == values
        begins = [content.index(word) for word in ("12", "-350.0", "true", "null")]
        assert [at for at, _ in got][1:5] == [content.count("\n", 0, at) + 1 for at in begins]


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'[\n {"a": 1},\n {"a": x}]', 3, "<not JSON: Expecting value at column 8>"),
        (b'[\n {"a": 1},\n {"a": "b', 3, "<not JSON: Unterminated string starting at at column 8>"),
        (b'[\n {"a": 1}', 2, "<expected a comma or the closing bracket after this object>"),
        (b'[\n {"a": "\xc3\xa9\xff"}]', 2, "<not UTF-8 at byte 13: invalid start byte>"),
        (b'[\n {"a": "\xc3\xa9\0"}]', 2, "<NUL byte at byte 13>"),
        (b'[\n {"a": "\xc3', 2, "<not UTF-8 at byte 11: unexpected end of data>"),
        (b"[\n 1,\n 2] 3", 3, "<something follows the array>"),
        (b'[\n {"a": 1, "a": [{}, 2]},\n 3]', 2, "key 'a' is given twice in one object"),
    ],
)
def test_a_broken_array_is_named_with_its_line_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, content: bytes, line: int, reason: str
) -> None:
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", chunk)
    faults = [(at, v) for at, v in found(write(tmp_path, "a.json", content)) if isinstance(v, str)]
    assert faults == [(line, reason)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_the_unicode_of_spreadsheets_is_told_by_its_name(tmp_path: Path, name: str, encoding: str) -> None:
    said = fault(write(tmp_path, name, "\ufefftext\na\n".encode(encoding)))
    assert f"{name}:1: not UTF-8 but UTF-16; save the file as UTF-8" in said


def test_a_last_line_that_may_be_half_written_is_said_to_be(tmp_path: Path) -> None:
    said = fault(write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b'))
    assert "a.jsonl:2: not JSON: Unterminated string" in said
    assert "the file ends in this line without a line end: is it whole?" in said


# Rows that are too long


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_a_row_of_a_gigabyte_is_refused_without_filling_memory(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, b'[{"text": "' if name == "a.json" else b'text\n"')
    with file.open("r+b") as stream:
        stream.seek(0, io.SEEK_END)
        for _ in range(2**10):
            stream.write(b"a" * 2**20)
    tracemalloc.start()
    said = fault(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    file.unlink()
    assert "longer than 64 MiB, which no row is" in said
    assert (
        peak < 6 * lines.MAX_ROW_BYTES
    )  # a piece of twice the limit, as bytes and as text, while it is put together


def test_rows_up_to_the_limit_are_read_and_the_next_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 100)
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 10)
    fits = json.dumps({"text": "a" * (99 - len('{"text": ""}'))})
    long = json.dumps({"text": "a" * 250})
    got = found(write(tmp_path, "a.jsonl", f"{fits}\n{long}\n{fits}\n"))
    assert [at for at, value in got if isinstance(value, dict)] == [1, 3]
    assert [at for at, value in got if isinstance(value, str)] == [2]
    got = found(write(tmp_path, "a.json", f"[{fits},\n{fits}]"))
    assert [at for at, value in got if isinstance(value, dict)] == [1, 2]
    assert found(write(tmp_path, "a.json", f"[{fits},\n{long}]"))[1][1].startswith("<longer than")
    monkeypatch.setattr(json_rows, "CHUNK_BYTES", 1000)
    got = found(write(tmp_path, "a.json", f"[{fits},\n{long},\n{fits}]"))
    assert [at for at, value in got if isinstance(value, dict)] == [1, 3]
    assert got[1][1].startswith("longer than")


# Folders


def test_a_folder_is_all_its_files_of_rows_by_name_and_each_may_have_a_format_of_its_own(
    tmp_path: Path,
) -> None:
    write(tmp_path, "b.csv", "text\nb\n")
    write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "a"}')
    write(tmp_path, "deeper/c.txt", "c\n")
    write(tmp_path, "README.md", "not rows")
    write(tmp_path, ".hidden.jsonl", "broken")
    write(tmp_path, ".cache/d.jsonl", "broken")
    reading = Reading()
    rows = read_rows(tmp_path, reading=reading)
    assert [row.text or "a" for row in rows] == ["a", "b", "c"]
    names = {str(Path(file).relative_to(tmp_path)): kind for file, kind in reading.formats.items()}
    assert names == {"a.jsonl": "prompt_completion", "b.csv": "text", "deeper/c.txt": "text"}
    assert [file.name for file in row_files([tmp_path / "b.csv", tmp_path])] == [
        "b.csv",
        "a.jsonl",
        "b.csv",
        "c.txt",
    ]
