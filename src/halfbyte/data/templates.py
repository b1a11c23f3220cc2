"""The chat formats halfbyte knows by name: text before and after each turn, as the models' makers write them.

It owns what each named format looks like and which tokens it needs; it must not know rows, tokenizers or the
templates that tokenizers bring.

Source: the chat template of the model each entry names, as its maker published it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from halfbyte.data.row import Json, Message
from halfbyte.errors import DataError
from halfbyte.settings import TemplateName

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class ToolWords:
    """How a chat format tells of tools, as text inside its plain turns.

    Attributes:
        listed: Text before and after the tools, each of which has a line of JSON, at the end of the system message.
        call: Text before a call's name, between it and the arguments, and after these; each has its lines.
        returned: Text before and after what a tool returned; what several return is one turn of the user's.
    """

    listed: tuple[str, str]
    call: tuple[str, str, str]
    returned: tuple[str, str]

    def spoken(self, messages: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
        """A conversation that begins with a system message, its tools, calls and results written out as words."""
        turns: list[Message] = []
        role_before = ""
        for message in messages:
            content = message.content
            if message.tool_calls:
                content = "\n".join([*([content] if content else []), *map(self._called, message.tool_calls)])
            if message.role == "tool":
                content = content.join(self.returned)
                if role_before == "tool":
                    content = f"{turns.pop().content}\n{content}"
            turns.append(Message("user" if message.role == "tool" else message.role, content))
            role_before = message.role
        if tools:
            before, after = self.listed
            listed = before + "".join("\n" + _json(tool) for tool in tools) + after
            turns[0] = replace(turns[0], content=turns[0].content + listed)
        return turns

    def _called(self, call: Json) -> str:
        function = call["function"]
        assert isinstance(function, dict)  # as rows have it
        before, between, after = self.call
        return f"{before}{function['name']}{between}{_json(function['arguments'])}{after}"


def _json(value: object) -> str:
    """JSON as transformers' `tojson` filter writes it."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class TurnTemplate:
    """A chat format: text before and after each turn.

    Attributes:
        before: Text before a turn's content, by role; the assistant's ends the generation prompt.
        after: Text after a turn's content, by role; the assistant's holds the stop token.
        stop: Text of the token that ends an answer.
        needs: Tokens it writes, each of which must be one token of the vocabulary.
        begin: Text before the first turn.
        lead: Text between the generation prompt and an answer's content, which the model writes.
        trims: Roles whose contents lose the blanks around them.
        default_system: System message of conversations that bring none.
        alternates: User and assistant take turns, and a system message stands inside the first user turn.
        tools: How it tells of tools; None where it has no place for any. It then has a default system message.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    stop: str
    needs: tuple[str, ...]
    begin: str = ""
    lead: str = ""
    trims: frozenset[str] = field(default_factory=frozenset)
    default_system: str | None = None
    alternates: bool = False
    tools: ToolWords | None = None

    def write(
        self, messages: Sequence[Message], tools: Sequence[Json] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as text, and the characters of each answer with its stop token.

        Raises:
            DataError: HB225 if the format has no place for a turn.
        """
        if self.default_system is not None and (not messages or messages[0].role != "system"):
            messages = (Message("system", self.default_system), *messages)
        if tools or any(message.tool_facts for message in messages):
            if self.tools is None:
                what = "the row has tools, for which the chat format has no place"
                raise DataError("HB225", what, fix="use a model whose own chat template writes tools")
            messages = self.tools.spoken(messages, tools)
        self._refuse_misplaced(messages)
        text, spans, role_before = self.begin, [], ""
        for message in messages:
            inside = self.alternates and role_before == "system"
            text += "" if inside else self.before[message.role]
            content = message.content.strip() if message.role in self.trims else message.content
            after = self.after[message.role]
            if message.role == "assistant":
                to_stop = after.index(self.stop) + len(self.stop)
                spans.append((len(text), len(text) + len(self.lead) + len(content) + to_stop))
                content = self.lead + content
            text += content + after
            role_before = message.role
        return text, spans

    def prompt(self, messages: Sequence[Message]) -> str:
        """A conversation as text up to where the assistant's next answer begins.

        Raises:
            DataError: HB225 if the format has no place for a turn.
        """
        return self.write(messages)[0] + self.before["assistant"]

    def _refuse_misplaced(self, messages: Sequence[Message]) -> None:
        roles = [message.role for message in messages]
        strange = [f"message {n} is a {role}'s" for n, role in enumerate(roles, 1) if role not in self.before]
        if self.alternates and not strange:
            first = 1 if roles[:1] == ["system"] else 0
            expected = ["user" if n % 2 == 0 else "assistant" for n in range(len(roles) - first)]
            wrong = [
                n for n, pair in enumerate(zip(roles[first:], expected, strict=True)) if pair[0] != pair[1]
            ]
            strange = [f"message {n + first + 1} is the {roles[n + first]}'s" for n in wrong[:1]]
        if strange:
            order = ": one system message at most, then user and assistant in turn" * self.alternates
            what = f"{strange[0]}, for which the chat format has no place{order}"
            raise DataError("HB225", what, fix="mend the row, or set data.template to another format")


def _each(text: str) -> dict[str, str]:
    """The same text for every role, `%` standing for its name."""
    return {role: text.replace("%", role) for role in ("system", "user", "assistant")}


_CHATML = TurnTemplate(
    before=_each("<|im_start|>%\n"),
    after=_each("<|im_end|>\n"),
    stop="<|im_end|>",
    needs=("<|im_start|>", "<|im_end|>"),
)

_QWEN_TOOLS = ToolWords(
    listed=(
        "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
        "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
    ),
    call=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    returned=("<tool_response>\n", "\n</tool_response>"),
)

FORMATS: Mapping[TemplateName, TurnTemplate] = {
    # teknium/OpenHermes-2.5-Mistral-7B
    "chatml": _CHATML,
    # Qwen/Qwen2.5-7B-Instruct: chatml with a system message of its own
    "qwen2": replace(_CHATML, default_system=QWEN_SYSTEM, tools=_QWEN_TOOLS),
    # meta-llama/Llama-2-7b-chat-hf
    "llama2": TurnTemplate(
        before={"system": "<s>[INST] <<SYS>>\n", "user": "<s>[INST] ", "assistant": ""},
        after={"system": "\n<</SYS>>\n\n", "user": " [/INST]", "assistant": " </s>"},
        stop="</s>",
        needs=("<s>", "</s>"),
        lead=" ",
        trims=frozenset(("user", "assistant")),
        alternates=True,
    ),
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama3": TurnTemplate(
        before=_each("<|start_header_id|>%<|end_header_id|>\n\n"),
        after=_each("<|eot_id|>"),
        stop="<|eot_id|>",
        needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin="<|begin_of_text|>",
        trims=frozenset(("system", "user", "assistant")),
    ),
    # mistralai/Mistral-7B-Instruct-v0.3, but for the system message: there it is part of the last question and
    # lost once that is answered; here it is part of the first, as llama.cpp has it
    "mistral": TurnTemplate(
        before={"system": "[INST] ", "user": "[INST] ", "assistant": ""},
        after={"system": "\n\n", "user": "[/INST]", "assistant": "</s>"},
        stop="</s>",
        needs=("<s>", "[INST]", "[/INST]", "</s>"),
        begin="<s>",
        lead=" ",
        trims=frozenset(("assistant",)),
        alternates=True,
    ),
    # google/gemma-3-4b-it; without a system message the same as google/gemma-7b-it and google/gemma-2-9b-it
    "gemma": TurnTemplate(
        before={
            "system": "<start_of_turn>user\n",
            "user": "<start_of_turn>user\n",
            "assistant": "<start_of_turn>model\n",
        },
        after={"system": "\n\n", "user": "<end_of_turn>\n", "assistant": "<end_of_turn>\n"},
        stop="<end_of_turn>",
        needs=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        begin="<bos>",
        trims=frozenset(("user", "assistant")),
        alternates=True,
    ),
    # microsoft/Phi-3-mini-4k-instruct
    "phi3": TurnTemplate(
        before=_each("<|%|>\n"),
        after=_each("<|end|>\n"),
        stop="<|end|>",
        needs=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    # HuggingFaceH4/zephyr-7b-beta, whose role names are plain text
    "zephyr": TurnTemplate(before=_each("<|%|>\n"), after=_each("</s>\n"), stop="</s>", needs=("</s>",)),
    # deepseek-ai/DeepSeek-V3
    "deepseek": TurnTemplate(
        before={"system": "", "user": "<｜User｜>", "assistant": "<｜Assistant｜>"},
        after={"system": "", "user": "", "assistant": "<｜end▁of▁sentence｜>"},
        stop="<｜end▁of▁sentence｜>",
        needs=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        begin="<｜begin▁of▁sentence｜>",
    ),
}


def named_template(name: TemplateName, eos: str) -> TurnTemplate | None:
    """The chat format of that name; None for the tokenizer's own.

    Args:
        name: As `data.template` names it, but not `auto`.
        eos: The tokenizer's end-of-text token, by which answers in `plain` end.
    """
    if name == "plain":
        return TurnTemplate(
            before={"system": "### Setting\n", "user": "### Request\n", "assistant": "### Reply\n"},
            after={"system": "\n\n", "user": "\n\n", "assistant": f"{eos}\n\n"},
            stop=eos,
            needs=(),
        )
    return FORMATS.get(name)
