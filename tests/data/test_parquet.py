"""Parquet files: what a row is in them, and every way such a file can be broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.container_files import fault, found, write

from halfbyte.data import lines, parquet_rows
from halfbyte.data.containers import CONTAINERS
from halfbyte.data.faults import Reading
from halfbyte.data.read import read_rows
from halfbyte.data.row import Message
from halfbyte.errors import DataError


def parquet(folder: Path, table: pa.Table, name: str = "a.parquet", **options: Any) -> Path:
    file = folder / name
    pq.write_table(table, file, **options)
    return file


def test_parquet_rows_are_those_of_the_same_json(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"a{n}"}, {"role": "assistant", "content": "é"}], "n": n}
        for n in range(2500)
    ]
    table = pa.Table.from_pylist(rows)
    read = read_rows(parquet(tmp_path, table, row_group_size=700))
    as_json = read_rows(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert [row.id for row in read] == [row.id for row in as_json]
    assert [row.line for row in read] == list(range(1, 2501))


def test_keys_that_only_other_turns_have_are_null_in_parquet_and_no_fault(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "b"}]
    [row] = read_rows(parquet(tmp_path, pa.Table.from_pylist([{"messages": turns}])))
    assert row.messages == (Message("user", "a"), Message("assistant", "b"))
    named = [{"messages": [{"role": "user", "content": "a", "name": "Ann"}]}]
    assert "message 1: got keys" in fault(parquet(tmp_path, pa.Table.from_pylist(named)))


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a"]).dictionary_encode(),
        pa.array(["a"], pa.large_string()),
        pa.array(["a"], pa.string_view()),
    ],
)
def test_texts_of_every_encoding_are_texts(tmp_path: Path, values: pa.Array) -> None:
    assert [row.text for row in read_rows(parquet(tmp_path, pa.table({"text": values})))] == ["a"]


@pytest.mark.parametrize(
    ("values", "type_", "got"),
    [
        ([b"a"], pa.binary(), "Parquet's binary"),
        ([[("a", "b")]], pa.map_(pa.string(), pa.string()), "Parquet's map<string, string"),
        ([[[("a", 1)]]], pa.list_(pa.map_(pa.string(), pa.int32())), "Parquet's list<"),
        ([1.5], pa.float32(), "a number"),
        ([["a"]], pa.list_(pa.string()), "an array"),
        ([None], pa.string(), "null"),
    ],
)
def test_a_type_no_text_is_made_of_is_named_where_it_is_needed_alone(
    tmp_path: Path, values: list[Any], type_: pa.DataType, got: str
) -> None:
    column = pa.array(values, type_)
    assert f"a.parquet:1: column 'text': got {got}" in fault(parquet(tmp_path, pa.table({"text": column})))
    beside = pa.table({"text": ["a"], "other": column})
    assert [row.text for row in read_rows(parquet(tmp_path, beside))] == ["a"]


def test_damaged_parquet_is_named_and_never_skipped(tmp_path: Path) -> None:
    whole = parquet(tmp_path, pa.table({"text": [f"{n}" * 50 for n in range(5000)]})).read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"prompt,completion\n",
        "hole": whole[:200] + b"\0" * 4000 + whole[4200:],
    }
    for name, content in damaged.items():
        file = write(tmp_path, f"{name}.parquet", content)
        with pytest.raises(DataError, match=f"{name}.parquet:1: not Parquet, or damaged: ") as caught:
            read_rows(file, reading=Reading(allowed=10))
        assert caught.value.code == "HB202"


def test_a_cell_beyond_the_limit_is_refused_by_its_row_and_the_next_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1000)
    texts = ["a" * 900, "b" * 1100, "c"]
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[:1]}] for text in texts
    ]
    for table in (
        pa.table({"text": texts}),
        pa.table({"messages": turns}),
        pa.table({"text": pa.array(texts * 9).dictionary_encode()}),
    ):
        got = found(parquet(tmp_path, table))
        assert [at for at, value in got if isinstance(value, str)] == list(range(2, len(table) + 1, 3))
        assert all(value.startswith("longer than") for _, value in got if isinstance(value, str))


def test_large_rows_of_parquet_are_held_a_few_at_a_time(tmp_path: Path) -> None:
    texts = [f"{n}" * 2**20 for n in range(10)] * 10
    file = parquet(
        tmp_path,
        pa.table({"text": texts}),
        row_group_size=100,
        write_batch_size=1,
        use_dictionary=False,
        compression="NONE",
    )
    before, most = pa.total_allocated_bytes(), 0
    for _, row in CONTAINERS[".parquet"](file):
        assert isinstance(row, dict)
        most = max(most, pa.total_allocated_bytes() - before)
    assert file.stat().st_size > 100 * 2**20
    assert most < 4 * parquet_rows.BYTES_AT_ONCE, most  # buffers double as they grow, and two batches meet


def test_nul_and_half_characters_in_parquet_are_named_by_row(tmp_path: Path) -> None:
    said = fault(parquet(tmp_path, pa.table({"text": ["a", "b\0", "c"]})))
    assert "1 bad line(s)\n" in said
    assert "a.parquet:2: column 'text': NUL character at 2" in said


def test_tools_whose_nulls_may_be_missing_keys_are_refused_in_parquet_and_fine_as_text(
    tmp_path: Path,
) -> None:
    """Structs of a column have the keys of all: a call for a city would be trained with a zip code of null."""

    def row(arguments: object, tools: object) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        turns = [
            {"role": "user", "content": "Dry?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": turns, "tools": tools}

    city, zipped = {"city": "Ulm"}, {"zip": "89073", "city": None}
    tool: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
    told = {"type": "function", "function": {"name": "weather", "description": "d"}}
    for arguments, tools in (((city, zipped), ([tool], [tool])), ((city, city), ([tool], [told]))):
        rows = [row(a, t) for a, t in zip(arguments, tools, strict=True)]
        said = fault(parquet(tmp_path, pa.Table.from_pylist(rows)))
        assert "a.parquet:1: tools or arguments hold null" in said
        as_text = [row(json.dumps(a), json.dumps(t)) for a, t in zip(arguments, tools, strict=True)]
        as_json = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
        read = read_rows(parquet(tmp_path, pa.Table.from_pylist(as_text)))
        assert [r.id for r in read] == [r.id for r in read_rows(as_json)]


def test_text_that_is_not_utf8_in_parquet_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b\xff", b"c"], pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    assert "1 bad line(s)\n" in (said := fault(parquet(tmp_path, pa.table({"text": text}))))
    assert "a.parquet:2: not UTF-8 at byte 2 of a cell" in said


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, "a.parquet", b""))
    assert caught.value.code == "HB215"
    assert "pip install 'halfbyte[parquet]'" in str(caught.value)
