"""Chat formats of widely used models: what is learnt of each turn, by template, by marks and by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.data.render import Renderer
from halfbyte.data.row import Message, Row
from halfbyte.data.templates import FORMATS
from halfbyte.data.tokenise import Example, tokenise
from halfbyte.errors import DataError

Make = Callable[..., Row]
TEMPLATES = Path(__file__).with_name("templates")
SYSTEM = "Be brief."
TURNS = ("Hi there", "Hello!", "Count to two.", "One,\n\ntwo.")
LONG = 4096


@dataclass(frozen=True)
class Model:
    """What a model's tokenizer has besides its vocabulary, and what is to be learnt of `TURNS`."""

    bos: str | None
    eos: str
    tokens: tuple[str, ...]
    learnt: tuple[str, str]
    takes_system: bool = True


CHATML = Model(None, "<|im_end|>", (), ("Hello!<|im_end|>", "One,\n\ntwo.<|im_end|>"))
MODELS = {
    "llama2": Model("<s>", "</s>", (), (" Hello! </s>", " One,\n\ntwo. </s>")),
    "llama3": Model(
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>"),
        ("Hello!<|eot_id|>", "One,\n\ntwo.<|eot_id|>"),
    ),
    "chatml": CHATML,
    # It writes the system message into the last question, and nowhere once that is answered.
    "mistral": Model(
        "<s>", "</s>", ("[INST]", "[/INST]"), (" Hello!</s>", " One,\n\ntwo.</s>"), takes_system=False
    ),
    "gemma": Model(
        "<bos>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        ("Hello!<end_of_turn>", "One,\n\ntwo.<end_of_turn>"),
    ),
    "phi3": Model(
        "<s>",
        "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("Hello!<|end|>", "One,\n\ntwo.<|end|>"),
    ),
    "zephyr": Model("<s>", "</s>", (), ("Hello!</s>", "One,\n\ntwo.</s>")),
    "qwen2": CHATML,
    "deepseek": Model(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        ("Hello!<｜end▁of▁sentence｜>", "One,\n\ntwo.<｜end▁of▁sentence｜>"),
    ),
}
MARKED = ("llama3", "gemma", "phi3", "qwen2")


@pytest.fixture
def tokenizer_of(tokenizers: Callable[[str], Any]) -> Callable[..., Any]:
    """A real byte-level vocabulary with a model's special tokens, and a template of `templates/`."""

    def make(name: str, template: str | None = None) -> Any:
        model, tokenizer = MODELS[name], copy.deepcopy(tokenizers("base-11m"))
        tokenizer.add_special_tokens(
            {
                "bos_token": model.bos,
                "eos_token": model.eos,
                "extra_special_tokens": ["<|im_start|>", "<|im_end|>", *model.tokens],
            }
            if model.bos
            else {"eos_token": model.eos}
        )
        tokenizer.chat_template = (TEMPLATES / f"{template or name}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


def learnt(example: Example, tokenizer: Any) -> list[str]:
    """The text of each run of trained tokens."""
    runs = groupby(zip(example.trained, example.input_ids, strict=True), key=lambda pair: pair[0])
    return [tokenizer.decode([int(i) for _, i in run]) for trained, run in runs if trained]


def one(row: Row, tokenizer: Any, template: Any = "tokenizer") -> Example:
    return tokenise(Renderer(tokenizer, template).render(row), tokenizer, LONG)


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", MODELS)
def test_just_the_answers_and_their_stop_tokens_are_learnt(
    tokenizer_of: Callable[..., Any], chat: Make, name: str, system: str | None
) -> None:
    model, tokenizer = MODELS[name], tokenizer_of(name)
    row = chat(*TURNS, system=system)
    if system and not model.takes_system:
        with pytest.raises(DataError, match="otherwise once it is answered"):
            one(row, tokenizer)
        return
    example = one(row, tokenizer)
    assert learnt(example, tokenizer) == list(model.learnt)
    # This vocabulary, as GPT-2's, takes the last of two line breaks off once a word follows; Llama 3's does not.
    assert example.aligned == (name != "llama3")
    assert system is None or system in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_by_name_writes_what_the_model_s_own_template_writes(
    tokenizer_of: Callable[..., Any], chat: Make, name: Any, system: str | None
) -> None:
    tokenizer = tokenizer_of(name)
    ours, theirs = Renderer(tokenizer, name), Renderer(tokenizer, "tokenizer")
    assert set(ours.stops) == set(theirs.stops)
    for row in (chat(*TURNS, system=system), chat("a ", "b ", "c\n", " d", system=system)):
        assert row.messages
        if system and not MODELS[name].takes_system:
            assert ours.prompt(row.messages[:-3]) == theirs.prompt(row.messages[:-3])
            continue
        assert ours.render(row) == theirs.render(row)
        assert ours.prompt(row.messages[:-1]) == theirs.prompt(row.messages[:-1])


@pytest.mark.parametrize("name", MARKED)
def test_marks_and_proof_agree(tokenizer_of: Callable[..., Any], chat: Make, name: str) -> None:
    plain, marked = tokenizer_of(name), tokenizer_of(name, f"{name}_marked")
    system = None if name == "gemma" else SYSTEM
    for row in (chat(*TURNS, system=system), chat(*TURNS[:2]), chat(*TURNS[:3], " x \n")):
        assert Renderer(marked).render(row) == Renderer(plain).render(row)
    assert learnt(one(chat(*TURNS), marked), marked) == list(MODELS[name].learnt)


def test_marks_are_trusted_where_earlier_answers_are_rewritten(
    tokenizer_of: Callable[..., Any], chat: Make
) -> None:
    tokenizer = tokenizer_of("chatml", "thinking_marked")
    example = one(chat(*TURNS), tokenizer)
    assert learnt(example, tokenizer) == [
        "Hello!<|im_end|>",
        "<think>\n\n</think>\n\nOne,\n\ntwo.<|im_end|>",
    ]
    assert example.aligned
    tokenizer.chat_template = tokenizer.chat_template.replace("generation -%}", "if true -%}", 1).replace(
        "endgeneration", "endif"
    )
    with pytest.raises(DataError, match="rewrites earlier answers"):
        one(chat(*TURNS), tokenizer)


def test_what_is_trusted_must_still_be_an_answer(tokenizer_of: Callable[..., Any], chat: Make) -> None:
    """From the second turn on, the marks hold the questions too; a template that rewrites proves nothing of them."""
    tokenizer = tokenizer_of("chatml", "thinking_marked")
    question = "{{- message.content + '<|im_end|>' -}}"
    head, plain, tail = tokenizer.chat_template.rpartition("{%- else -%}")
    assert question in tail
    marked = "{%- elif loop.index > 2 -%}{%- generation -%}" + question + "{%- endgeneration -%}"
    tokenizer.chat_template = head + marked + plain + tail
    assert learnt(one(chat(*TURNS[:2]), tokenizer), tokenizer) == ["<think>\n\n</think>\n\nHello!<|im_end|>"]
    with pytest.raises(DataError, match="marks 'Count to two") as caught:
        one(chat(*TURNS), tokenizer)
    assert caught.value.code == "HB224"


BAD_MARKS = {
    "without the stop token": (
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
        "HB207",
        "leave out the stop token after 'This is an answer.'",
    ),
    "with the role": (
        "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>{% endgeneration %}\n",
        "HB224",
        "marks '<|im_start|>assistant",
    ),
    "not on the last answer": (
        "{% if loop.last %}{{ m.content }}<|im_end|>\n{% else %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endif %}",
        "HB224",
        "does not mark the last answer",
    ),
}


@pytest.mark.parametrize("name", BAD_MARKS)
def test_marks_that_are_not_the_answers_are_refused(
    templated: Callable[[str, str], Any], chat: Make, name: str
) -> None:
    body, code, said = BAD_MARKS[name]
    head = "" if name == "with the role" else "<|im_start|>assistant\n"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + head + body + "{% else %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError) as caught:
        one(chat(*TURNS), templated("base-11m", template))
    assert caught.value.code == code
    assert said in caught.value.what


def test_a_last_answer_without_a_mark_is_refused_where_others_have_one(
    tokenizer_of: Callable[..., Any], chat: Make
) -> None:
    tokenizer = tokenizer_of("llama3", "llama3_marked")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.role == 'assistant'", "message.role == 'assistant' and loop.index < 4"
    )
    assert learnt(one(chat(*TURNS[:2]), tokenizer), tokenizer) == ["Hello!<|eot_id|>"]
    with pytest.raises(DataError, match="does not mark the last answer") as caught:
        one(chat(*TURNS), tokenizer)
    assert caught.value.code == "HB224"


def test_an_answer_that_ends_in_a_token_is_marked_whole(tokenizer_of: Callable[..., Any], chat: Make) -> None:
    tokenizer = tokenizer_of("llama3", "llama3_marked")
    tokenizer.add_tokens(["</call>"])
    assert learnt(one(chat("Hi", "go</call>"), tokenizer), tokenizer) == ["go</call><|eot_id|>"]


def test_marks_on_a_question_are_refused(templated: Callable[[str, str], Any], chat: Make) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="marks 'Is this a question") as caught:
        one(chat(*TURNS), templated("base-11m", template))
    assert caught.value.code == "HB224"


def test_what_a_mark_leaves_out_of_an_answer_is_not_learnt(
    templated: Callable[[str, str], Any], chat: Make
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = templated("base-11m", template)
    rendered = Renderer(tokenizer).render(chat(*TURNS))
    assert [rendered.text[b:e] for b, e in rendered.trained] == ["Hello!<|im_end|>", "One,\n\ntwo.<|im_end|>"]
    assert rendered.prompt.endswith("<|im_start|>assistant\n")


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL_TURNS = (
    Message("system", SYSTEM),
    Message("user", "Is it dry in Ulm?"),
    Message("assistant", "Let me see.", (CALL,)),
    Message("tool", "rain"),
    Message("assistant", "No, it rains."),
)
TOOL_ROW = Row(TOOL_TURNS, None, "rows.jsonl", 1, tools=(WEATHER,))


def test_calls_of_tools_are_learnt_and_what_they_return_is_not(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer = tokenizer_of("qwen2")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    example = one(TOOL_ROW, tokenizer)
    assert learnt(example, tokenizer) == [
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>',
        "No, it rains.<|im_end|>",
    ]
    text = tokenizer.decode(example.input_ids)
    assert '"properties": {"city"' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    asks = replace(TOOL_ROW, messages=TOOL_TURNS[:3])
    assert one(asks, tokenizer).answer is None, "an answer in words alone would be graded"
    assert learnt(one(asks, tokenizer), tokenizer) == learnt(example, tokenizer)[:1]


def calls(*arguments: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple({"type": "function", "function": {"name": "weather", "arguments": a}} for a in arguments)


TOOL_TALKS: dict[str, tuple[Message, ...]] = {
    "words and a call": TOOL_TURNS,
    "a call at the end": TOOL_TURNS[:3],
    "no words, no system message": (TOOL_TURNS[1], Message("assistant", "", (CALL,)), *TOOL_TURNS[3:]),
    "two calls, two results": (
        TOOL_TURNS[1],
        Message("assistant", "", calls({"city": "Zürich", "days": [1, 2.5, None]}, {})),
        Message("tool", "rain", name="weather", tool_call_id="a"),
        Message("tool", '{"sky": "\n"}'),
        Message("assistant", "Wet."),
        Message("user", "And now?"),
        Message("assistant", "Wait.", calls({"city": "<b>"})),
        Message("tool", ""),
        Message("assistant", "Dry."),
    ),
}


@pytest.mark.parametrize(
    "tools", [(WEATHER,), (WEATHER, {"type": "function", "function": {"name": "é"}}), ()]
)
@pytest.mark.parametrize("talk", TOOL_TALKS)
def test_tools_are_written_and_learnt_as_transformers_writes_them(
    tokenizer_of: Callable[..., Any], talk: str, tools: tuple[dict[str, Any], ...]
) -> None:
    """By name and by the own template, held against `apply_chat_template` and its `{% generation %}` mask."""
    row = Row(TOOL_TALKS[talk], None, "rows.jsonl", 1, tools=tools)
    tokenizer, marked = tokenizer_of("qwen2"), tokenizer_of("qwen2", "qwen2_tools_marked")
    assert row.messages
    plain = [{"role": m.role, "content": m.content, **m.tool_facts} for m in row.messages]
    expected = marked.apply_chat_template(
        plain, tools=list(tools) or None, return_dict=True, return_assistant_tokens_mask=True
    )
    own, named = one(row, tokenizer), one(row, tokenizer, "qwen2")
    for found in (own, named):
        length = len(found.input_ids)  # the template goes on with the line break behind the last stop token
        assert found.input_ids.tolist() == expected["input_ids"][:length]
        assert tokenizer.decode(expected["input_ids"][length:]).strip() == ""
        assert found.trained.tolist() == [bool(t) for t in expected["assistant_masks"][:length]]
    assert (own.answer, own.aligned) == (named.answer, named.aligned)
    before = plain[:-1]
    asked = tokenizer.apply_chat_template(before, tools=list(tools) or None, add_generation_prompt=True)
    assert named.prompt_ids is not None
    assert named.prompt_ids.tolist() == (asked if isinstance(asked, list) else asked["input_ids"])


def test_of_several_templates_the_one_for_tools_is_taken(tokenizer_of: Callable[..., Any]) -> None:
    tokenizer, plain = tokenizer_of("qwen2"), tokenizer_of("chatml")
    both = {"default": plain.chat_template, "tool_use": tokenizer.chat_template}
    alone = Renderer(tokenizer).render(TOOL_ROW)
    tokenizer.chat_template = both
    assert Renderer(tokenizer).render(TOOL_ROW) == alone
    tokenizer.chat_template = {"tool_use": both["tool_use"]}
    with pytest.raises(DataError, match="several chat templates and none by default"):
        one(replace(TOOL_ROW, tools=(), messages=TOOL_TURNS[:1] + TOOL_TURNS[4:]), tokenizer)


def test_tools_that_would_be_lost_are_refused(tokenizer_of: Callable[..., Any]) -> None:
    for template, code, said in (
        ("chatml", "HB225", "the row has tools, for which the chat format has no place"),
        ("tokenizer", "HB206", "does not write message 3 and its tool calls as they are"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            one(TOOL_ROW, tokenizer_of("chatml"), template)
        assert caught.value.code == code
    answer_alone = replace(TOOL_ROW, tools=(), messages=(*TOOL_TURNS[:2], *TOOL_TURNS[3:]))
    with pytest.raises(DataError, match="message 3 is a tool's, for which"):
        one(answer_alone, tokenizer_of("chatml"), "chatml")
    planted = Message("assistant", "", ({"function": {"name": "<|im_end|>", "arguments": {}}},))
    with pytest.raises(DataError, match="message 3 holds '<|im_end|>'"):
        one(replace(TOOL_ROW, messages=(*TOOL_TURNS[:2], planted)), tokenizer_of("qwen2"))


def test_tools_are_part_of_what_a_row_is() -> None:
    ids = {
        TOOL_ROW.id,
        replace(TOOL_ROW, tools=()).id,
        replace(TOOL_ROW, tools=(), messages=(TOOL_TURNS[1], Message("assistant", "Let me see."))).id,
    }
    assert len(ids) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_a_vocabulary_without_a_format_s_tokens_is_refused(
    tokenizers: Callable[[str], Any], name: Any
) -> None:
    vocabulary = "llama2-tokenizer" if "</s>" not in FORMATS[name].needs else "base-11m"
    if name == "chatml":
        assert Renderer(tokenizers("base-11m"), name).template == name
    with pytest.raises(DataError) as caught:
        Renderer(tokenizers(vocabulary), name)
    assert caught.value.code == "HB226"
    present = {token.content for token in tokenizers(vocabulary).added_tokens_decoder.values()}
    assert all((token in caught.value.what) == (token not in present) for token in FORMATS[name].needs)


@pytest.mark.parametrize("name", [name for name, own in FORMATS.items() if own.alternates])
def test_turns_out_of_order_are_refused(tokenizer_of: Callable[..., Any], name: Any) -> None:
    user, answer, system = Message("user", "a"), Message("assistant", "b"), Message("system", "s")
    for turns, at in (
        ((answer,), 1),
        ((user, user, answer), 2),
        ((system, answer), 2),
        ((user, answer, system, user, answer), 3),
    ):
        with pytest.raises(DataError, match=rf"message {at} is the .*'s, for which") as caught:
            one(Row(turns, None, "rows.jsonl", 1), tokenizer_of(name), name)
        assert caught.value.code == "HB225"


def test_what_is_not_learnt_does_not_reach_the_loss(tokenizer_of: Callable[..., Any], chat: Make) -> None:
    """Another question of as many tokens gives other inputs and the same targets."""
    for name in MODELS:
        tokenizer = tokenizer_of(name)
        a, b = (one(chat(question, *TURNS[1:]), tokenizer) for question in ("Hi there", "Hi Paris"))
        assert not np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.input_ids[a.trained], b.input_ids[b.trained])
        labels = np.where(a.trained, a.input_ids, -100)
        changed = np.where(a.trained, a.input_ids, 7)
        assert np.array_equal(np.where(a.trained, changed, -100), labels)
