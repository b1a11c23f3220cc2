"""Tools that a row offers and the calls an assistant makes of them, from cells, in the form that chat templates take.

It owns their shape and its faults; it must not know columns, formats or how a template writes a call.

Source: OpenAI's chat completions, whose form transformers' chat templates take (arguments as an object, not as JSON
text); LLaMA-Factory's data/README.md for tools and calls without `function` around them.
"""

from __future__ import annotations

from halfbyte.data.faults import BadRowError
from halfbyte.data.json_rows import parse_json
from halfbyte.data.row import Json
from halfbyte.data.values import kind, quoted, refuse_odd_characters


def tools_in(value: object, place: str) -> tuple[Json, ...]:
    """The tools of a row, each as `{"type": "function", "function": {"name": …}}`.

    Args:
        value: An array of tools, or one as JSON text; nothing, or an empty text, is none.
        place: What is named where something is wrong.

    Raises:
        BadRowError: What is wrong with them.
    """
    if value is None or value == "":
        return ()
    found = _json(value, place)
    if not isinstance(found, list):
        raise BadRowError(f"{place} got {kind(found)}, expected an array of tools")
    return tuple(_wrapped(tool, f"{place} tool {number}:") for number, tool in enumerate(found, start=1))


def calls_in(value: object, place: str) -> tuple[Json, ...]:
    """The calls of a turn, each as `{"type": "function", "function": {"name": …, "arguments": {…}}}`, with its id.

    Args:
        value: A call, an array of them, or either as JSON text.
        place: What is named where something is wrong.

    Raises:
        BadRowError: What is wrong with them.
    """
    found = _json(value, place)
    calls = found if isinstance(found, list) else [found]
    return tuple(_call(call, f"{place} call {number}:") for number, call in enumerate(calls, start=1))


def _call(call: object, place: str) -> Json:
    wrapped = _wrapped(call, place)
    if odd := [key for key in wrapped if key not in ("id", "type", "function")]:
        raise BadRowError(f"{place} got keys {quoted(odd)}, expected id, type and function")
    function = wrapped["function"]
    assert isinstance(function, dict)  # `_wrapped` saw to it
    if set(function) != {"name", "arguments"}:
        raise BadRowError(f"{place} got keys {quoted(function)}, expected name and arguments alone")
    arguments = _json(function["arguments"], f"{place} arguments:")
    if not isinstance(arguments, dict):
        raise BadRowError(f"{place} arguments: got {kind(arguments)}, expected an object")
    return wrapped | {"function": {"name": function["name"], "arguments": arguments}}


def _wrapped(tool: object, place: str) -> Json:
    """A function with its name inside `function`, whether it was found so or bare."""
    if not isinstance(tool, dict):
        raise BadRowError(f"{place} got {kind(tool)}, expected an object")
    given = {key: value for key, value in tool.items() if value is not None}
    if given.get("type", "function") != "function":
        raise BadRowError(f"{place} got the type {given['type']!r}, expected 'function'")
    if "function" not in given:
        function = {key: value for key, value in given.items() if key not in ("id", "type")}
        given = {key: value for key, value in given.items() if key in ("id", "type")} | {"function": function}
    function = given["function"]
    if not isinstance(function, dict):
        raise BadRowError(f"{place} 'function': got {kind(function)}, expected an object")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        got = "blank text" if isinstance(name, str) else kind(name)
        raise BadRowError(f"{place} 'name': got {got}, expected the function's name")
    refuse_odd_characters(given, place.removesuffix(":"))
    return {"type": "function"} | given


def _json(value: object, place: str) -> object:
    """A value, or what it says as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except BadRowError as bad:
        raise BadRowError(f"{place} {bad}") from None


def may_lack_keys(row: Json) -> bool:
    """Whether a row of Parquet has nulls in tools or arguments, which there may stand for keys that were never given.

    A column of structs gives each of them the keys of all, so what was left out and what is null look alike.
    """
    turns = [
        turn for cell in row.values() if isinstance(cell, list) for turn in cell if isinstance(turn, dict)
    ]
    calls = [call for turn in turns for call in turn.get("tool_calls") or () if isinstance(call, dict)]
    functions = [call.get("function") or call for call in calls]
    arguments = [function.get("arguments") for function in functions if isinstance(function, dict)]
    tools = row.get("tools")
    schemas = (
        [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    )
    return any(isinstance(part, dict) and _holds_null(part) for part in (*arguments, *schemas))


def _holds_null(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(_holds_null, value)))
