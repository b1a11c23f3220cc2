"""Column formats: how rows of each are taken, which format a row has, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from halfbyte.data.faults import BadRowError
from halfbyte.data.layouts import LAYOUTS, Place, layout_of
from halfbyte.data.read import read_rows
from halfbyte.data.row import Message, Row
from halfbyte.errors import DataError
from halfbyte.settings import DataFormat


def taken(row: dict[str, Any], wanted: DataFormat = "auto") -> Row:
    return layout_of(tuple(row), wanted).row(row, Place("rows.jsonl", 3))


def fault(row: dict[str, Any], wanted: DataFormat = "auto") -> str:
    with pytest.raises(BadRowError) as caught:
        taken(row, wanted)
    return str(caught.value)


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    first = () if system is None else (Message("system", system),)
    return (*first, *(Message(roles[n % 2], words) for n, words in enumerate(contents)))  # type: ignore[arg-type]


def keyed(messages: tuple[Message, ...], sharegpt: bool = False) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    if sharegpt:
        return [{"from": names[m.role], "value": m.content} for m in messages]
    return [{"role": m.role, "content": m.content} for m in messages]


# Conversations


@pytest.mark.parametrize("sharegpt", [True, False])
def test_sharegpt_turns_are_messages_however_they_are_keyed(sharegpt: bool) -> None:
    talk = turns("a", "b", "c", "d", system="s")
    row = taken({"id": "x", "conversations": keyed(talk, sharegpt)})
    assert (row.messages, row.style, row.objective, row.where) == (talk, "chat", "sft", "rows.jsonl:3")


def test_a_system_column_begins_the_conversation_and_may_not_be_there_twice() -> None:
    row = {"conversations": keyed(turns("a", "b"), sharegpt=True), "system": "s"}
    assert taken(row).messages == turns("a", "b", system="s")
    assert taken(row | {"system": ""}).messages == turns("a", "b")
    row["conversations"] = keyed(turns("a", "b", system="t"), sharegpt=True)
    assert "begins with a system message too" in fault(row)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "narrator", "value": "{}"}, "turn 1: unknown role 'narrator', expected system"),
        ({"from": "human", "value": "a", "weight": 0}, "got keys 'from', 'value', 'weight', expected from"),
        ({"from": "human", "value": ["a"]}, "'value': got an array, expected text"),
        ({"from": "human"}, "got keys 'from', expected from and value alone"),
        ("a", "'conversations' turn 1: got text, expected an object"),
    ],
)
def test_a_turn_that_would_lose_something_is_refused(turn: object, reason: str) -> None:
    assert reason in fault({"conversations": [turn]})


def test_alpaca_rows_may_have_a_system_message_and_a_history() -> None:
    row = {
        "instruction": "c",
        "input": "d",
        "output": "e",
        "system": "s",
        "history": [["a", "b"], ["a2", "b2"]],
    }
    assert taken(row).messages == turns("a", "b", "a2", "b2", "c\n\nd", "e", system="s")
    assert taken(row | {"history": None, "system": None}).messages == turns("c\n\nd", "e")
    assert taken(row | {"history": [], "system": ""}).messages == turns("c\n\nd", "e")
    assert "'history': got text, expected pairs" in fault(row | {"history": ["ab"]})
    assert "'history': got text, expected pairs" in fault(row | {"history": "[]x"})
    assert "'history': 'assistant': got null, expected text" in fault(row | {"history": [["a", None]]})


def test_a_prompt_and_its_completion_may_be_messages() -> None:
    row = {"prompt": keyed(turns("a", "b", "c")), "completion": keyed(turns("x", "d"))[1:]}
    assert (taken(row).messages, taken(row).style) == (turns("a", "b", "c", "d"), "chat")
    assert taken({"prompt": "a", "completion": "b"}).style == "completion"


@pytest.mark.parametrize("column", ["functions", "images", "videos", "audios", "history", "system"])
def test_columns_that_would_be_lost_are_refused_unless_they_are_empty(column: str) -> None:
    row = {"messages": keyed(turns("a", "b"))}
    assert f"column '{column}' is not supported and would be lost" in fault(row | {column: "x"})
    for empty in (None, "", [], "[]"):
        assert taken(row | {column: empty}).messages == turns("a", "b")


# Tools

FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm", "zip": None}}}
CALLED = (
    Message("user", "Is it dry?"),
    Message("assistant", "", (CALL,)),
    Message("tool", "rain"),
    Message("assistant", "No."),
)


def called(call: object, **more: Any) -> list[dict[str, Any]]:
    """`CALLED` as messages, with the call as it is given."""
    turns = [{"role": m.role, "content": m.content} for m in CALLED]
    turns[1] = {"role": "assistant", "content": None, "tool_calls": [call], **more}
    return turns


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION])])
@pytest.mark.parametrize(
    "call",
    [
        CALL,
        CALL["function"],
        {"function": {"name": "weather", "arguments": '{"city": "Ulm", "zip": null}'}},
    ],
)
def test_tools_and_calls_are_one_whether_bare_or_wrapped_text_or_object(tools: object, call: object) -> None:
    row = taken({"messages": called(call), "tools": tools})
    assert (row.messages, row.tools) == (CALLED, (TOOL,))
    assert taken({"messages": called(call), "tools": "[]"}).tools == ()
    assert row.id != taken({"messages": called(call)}).id


def test_a_call_keeps_its_id_and_what_a_tool_returns_its_name(tmp_path: Path) -> None:
    turns = called(CALL | {"id": "abc"}, content="Let me see.")
    turns[2] |= {"tool_call_id": "abc", "name": "weather"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    [row] = read_rows(file)
    assert row.messages
    assert row.messages[1] == Message("assistant", "Let me see.", (CALL | {"id": "abc"},))
    assert row.messages[2] == Message("tool", "rain", name="weather", tool_call_id="abc")
    ids = {
        row.id,
        *(taken({"messages": changed}).id for changed in (called(CALL), called(CALL | {"id": "x"}))),
    }
    assert len(ids) == 3


@pytest.mark.parametrize("many", [True, False])
def test_sharegpt_calls_functions_and_observes(many: bool) -> None:
    talk = keyed((CALLED[0],), sharegpt=True)
    value = json.dumps([CALL["function"]] * 2 if many else CALL["function"])
    talk += [{"from": "function_call", "value": value}, {"from": "observation", "value": "rain"}]
    row = taken({"conversations": [*talk, {"from": "gpt", "value": "No."}], "tools": json.dumps([FUNCTION])})
    asked = Message("assistant", "", (CALL, CALL) if many else (CALL,))
    assert (row.messages, row.tools) == ((CALLED[0], asked, *CALLED[2:]), (TOOL,))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tools": "x"}, "column 'tools': not JSON: Expecting value at column 1"),
        ({"tools": '{"name": "f"}'}, "column 'tools': got an object, expected an array of tools"),
        ({"tools": '[{"name": "f", "name": "g"}]'}, "key 'name' is given twice in one object"),
        ({"tools": [FUNCTION, 3]}, "column 'tools': tool 2: got a number, expected an object"),
        ({"tools": [{"description": "d"}]}, "tool 1: 'name': got null, expected the function's name"),
        ({"tools": [{"name": " "}]}, "tool 1: 'name': got blank text, expected the function's name"),
        (
            {"tools": [{"type": "code_interpreter"}]},
            "tool 1: got the type 'code_interpreter', expected 'function'",
        ),
        (
            {"tools": [{"type": "function", "function": "f"}]},
            "tool 1: 'function': got text, expected an object",
        ),
        ({"tools": [{"name": "f", "description": "a\0"}]}, "tool 1: NUL character at 2"),
        ({"messages": called("f()")}, "message 2: call 1: got text, expected an object"),
        (
            {"messages": called({"name": "f"})},
            "message 2: call 1: got keys 'name', expected name and arguments",
        ),
        (
            {"messages": called({"name": "f", "arguments": "x"})},
            "call 1: arguments: not JSON: Expecting value",
        ),
        (
            {"messages": called({"name": "f", "arguments": [1]})},
            "call 1: arguments: got an array, expected an",
        ),
        ({"messages": called(CALL | {"index": 0})}, "message 2: call 1: got keys 'index', expected id, type"),
        (
            {"messages": called(CALL, weight=0)},
            "got keys 'role', 'content', 'tool_calls', 'weight', expected role",
        ),
        (
            {"messages": called({"name": "f", "arguments": {"a": "\ud800"}})},
            "half a surrogate pair at character 1",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "message 1: got keys 'role', 'content', 'tool_calls', expected role and content alone",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "weather()"}]},
            "'conversations' turn 1: not JSON: Expecting value at column 1",
        ),
    ],
)
def test_tools_that_are_none_are_named_with_their_reason(row: dict[str, Any], reason: str) -> None:
    assert reason in fault(row if "conversations" in row else {"messages": called(CALL)} | row)


# Preference pairs

BETTER, WORSE = turns("a", "b", "c", "better"), turns("a", "b", "c", "worse")
PROMPT, GOOD, BAD = BETTER[:3], BETTER[3:], WORSE[3:]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": keyed(PROMPT), "chosen": keyed(GOOD), "rejected": keyed(BAD)},  # TRL, explicit prompt
        {"chosen": keyed(BETTER), "rejected": keyed(WORSE)},  # TRL, implicit prompt
        {"prompt": keyed(PROMPT), "chosen": keyed(BETTER), "rejected": keyed(WORSE)},  # the prompt repeated
        {"prompt": keyed(PROMPT), "chosen": "better", "rejected": "worse"},
        {
            "conversations": keyed(PROMPT, True),
            "chosen": keyed(GOOD, True)[0],
            "rejected": keyed(BAD, True)[0],
        },
        {"instruction": "c", "history": [["a", "b"]], "chosen": "better", "rejected": "worse"},
    ],
)
def test_a_pair_is_two_conversations_with_one_prompt(row: dict[str, Any]) -> None:
    pair = taken(row)
    assert (pair.messages, pair.rejected) == (BETTER, WORSE)
    assert (pair.style, pair.objective) == ("chat", "preference")


def test_ultrafeedbacks_prompt_is_not_doubled() -> None:
    row = {"prompt": "a", "chosen": keyed(turns("a", "b")), "rejected": keyed(turns("a", "c"))}
    assert (taken(row).messages, taken(row).rejected) == (turns("a", "b"), turns("a", "c"))


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        # The pairs of texts of TRL's documentation of its dataset formats.
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            "The sky is",
            (" blue.", " green."),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "The sky is",
            (" blue.", " green."),
        ),
        ({"chosen": "Q: 1\n\nA: 2", "rejected": "Q: 1\n\nA:3"}, "Q: 1\n\nA:", (" 2", "3")),
    ],
)
def test_pairs_of_texts_are_prompts_with_completions(
    row: dict[str, Any], prompt: str, answers: tuple[str, str]
) -> None:
    pair = taken(row)
    assert (pair.messages, pair.rejected) == (turns(prompt, answers[0]), turns(prompt, answers[1]))
    assert (pair.style, pair.objective) == ("completion", "preference")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "'chosen' and 'rejected' do not begin alike, and no column"),
        ({"chosen": keyed(turns("a", "b")), "rejected": keyed(turns("c", "d"))}, "do not begin alike"),
        ({"chosen": keyed(turns("a", "b")), "rejected": "a"}, "do not begin alike"),
        (
            {"prompt": "a", "chosen": keyed(turns("x", "b")), "rejected": keyed(turns("a", "c"))},
            "column 'chosen': begins with the user: it neither repeats the prompt nor goes on",
        ),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen': got a number, expected text"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected': got null, expected text"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "'chosen': got an empty array, expected messages"),
    ],
)
def test_a_pair_without_one_prompt_is_refused(row: dict[str, Any], reason: str) -> None:
    assert reason in fault(row)


# Verdicts and classes


@pytest.mark.parametrize(
    ("row", "talk", "style"),
    [
        ({"prompt": "a", "completion": "b"}, turns("a", "b"), "completion"),
        ({"messages": keyed(turns("a", "b"))}, turns("a", "b"), "chat"),
        ({"conversations": keyed(turns("a", "b"), True)}, turns("a", "b"), "chat"),
        ({"instruction": "a", "input": "c", "output": "b"}, turns("a\n\nc", "b"), "chat"),
    ],
)
def test_a_verdict_is_true_or_false_and_nothing_else(
    row: dict[str, Any], talk: tuple[Message, ...], style: str
) -> None:
    for label, verdict in ((True, True), (False, False), ("True", True), ("false", False)):
        judged = taken(row | {"label": label})
        assert (judged.messages, judged.label, judged.style) == (talk, verdict, style)
        assert judged.objective == "kto"
    for label, got in ((1, "1"), ("yes", "'yes'"), (None, "null"), (0.5, "a number")):
        assert f"column 'label': got {got}, expected true or false" in fault(row | {"label": label})


@pytest.mark.parametrize(
    ("columns", "pair"),
    [
        (("text",), False),
        (("text", "text_pair"), True),
        (("sentence",), False),
        (("sentence1", "sentence2"), True),
        (("premise", "hypothesis"), True),
        (("question", "sentence"), True),
        (("question1", "question2"), True),
    ],
)
def test_classified_texts_come_from_the_columns_of_glue(columns: tuple[str, ...], pair: bool) -> None:
    row = taken(dict(zip(columns, ("a", "b"), strict=False)) | {"label": "entailment", "idx": "7"})
    assert (row.text, row.text_pair, row.label) == ("a", "b" if pair else None, "entailment")
    assert (row.messages, row.objective) == (None, "classification")


def test_a_class_is_a_name_or_a_number_and_the_number_is_the_same_however_it_is_written() -> None:
    labels = {"0": 0, 0: 0, "12": 12, "01": "01", "1.0": "1.0", " x ": " x ", "²": "²", "9" * 30: "9" * 30}
    assert {given: taken({"text": "a", "label": given}).label for given in labels} == labels
    for label, got in (
        (True, "true"),
        (0.5, "a number"),
        (None, "null"),
        (" ", "blank text"),
        (["x"], "an array"),
    ):
        assert f"column 'label': got {got}, expected a class" in fault({"text": "a", "label": label})
    for label in (-1, "-1"):
        assert "got -1, expected a class from 0" in fault({"text": "a", "label": label})


# Which format a row has


def test_every_format_has_a_layout_and_each_layout_recognises_its_own_columns() -> None:
    assert {layout.format for layout in LAYOUTS} | {"auto"} == set(get_args(DataFormat))
    for layout in LAYOUTS:
        assert layout_of(layout.columns, "auto") is layout
        assert layout_of((*layout.columns, "id", "source"), layout.format) is layout


def test_columns_of_two_formats_are_told_apart_by_the_setting_alone() -> None:
    row = {
        "messages": keyed(turns("a", "b")),
        "instruction": "a",
        "chosen": "b",
        "rejected": "c",
        "output": "d",
    }
    assert "columns fit alpaca and preference; set data.format" in fault(
        {k: v for k, v in row.items() if k != "messages"}
    )
    assert "columns fit preference in two ways" in fault({k: v for k, v in row.items() if k != "output"})
    assert taken(row, "messages").objective == "sft"
    assert taken(row, "alpaca").objective == "sft"
    pair = {"messages": keyed(turns("a")), "chosen": "b", "rejected": "c"}
    assert taken(pair, "auto").objective == taken(pair, "preference").objective == "preference"
    both = {"text": "a", "sentence": "b", "label": 1}
    assert "columns fit classification in two ways, (text, label) and (sentence, label)" in fault(both)
    assert taken(both, "text").text == "a"


def test_a_column_that_is_missing_is_named_for_the_nearest_way_to_write_the_format() -> None:
    said = fault({"instruction": "a", "chosen": "b"}, "preference")
    assert "column 'rejected' missing for a preference row" in said


def test_a_row_of_another_format_than_its_file_is_refused(tmp_path: Path) -> None:
    rows = [
        {"messages": keyed(turns("a", "b"))},
        {"messages": keyed(turns("a", "b")), "label": True},
        {"text": "a"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as caught:
        read_rows(file)
    said = str(caught.value)
    assert "2 bad line(s)" in said
    assert "rows.jsonl:2: columns of a kto row, but the rest of the file are messages rows" in said
    assert "rows.jsonl:3: column 'messages' missing for a messages row as in the rest of the file" in said


# The content hash


def test_the_id_of_rows_without_judgement_is_what_it_always_was() -> None:
    talk = Row(turns("a", "b"), None, "x", 1)
    assert talk.id == "e9090a957d1421f5"
    assert Row(None, "a", "x", 1, "text").id == "ac8d8342bbb2362d"


def test_the_id_covers_rejected_answer_label_and_second_text() -> None:
    talk, text = turns("a", "b"), ("a", "x", 1, "text")
    rows = [
        Row(talk, None, "x", 1),
        Row(talk, None, "x", 1, rejected=turns("a", "c")),
        Row(talk, None, "x", 1, rejected=turns("a", "d")),
        Row(talk, None, "x", 1, label=True),
        Row(talk, None, "x", 1, label=False),
        Row(None, *text),  # type: ignore[arg-type]
        *(Row(None, *text, label=label) for label in (0, 1, "1", True)),  # type: ignore[arg-type]
        Row(None, *text, label=1, text_pair="b"),  # type: ignore[arg-type]
    ]
    assert len({row.id for row in rows}) == len(rows)
    assert Row(talk, None, "y", 9, "completion", label=True).id == rows[3].id
