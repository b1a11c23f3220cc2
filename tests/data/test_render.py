"""Rendering: our chat formats, strangers' templates, and every template that must not be trusted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from halfbyte.data.render import Rendered, Renderer
from halfbyte.data.row import Message, Row
from halfbyte.data.tokenise import tokenise_rows
from halfbyte.errors import DataError

Make = Callable[..., Row]
Tokenizers = Callable[[str], Any]
Templated = Callable[[str, str], Any]


def learnt(rendered: Rendered) -> list[str]:
    return [rendered.text[begin:end] for begin, end in rendered.trained]


def refused(renderer: Renderer, row: Row) -> DataError:
    with pytest.raises(DataError) as caught:
        renderer.render(row)
    assert caught.value.where == row.where
    return caught.value


def test_chatml_is_chosen_where_its_tokens_exist(tokenizers: Tokenizers, chat: Make) -> None:
    renderer = Renderer(tokenizers("base-11m"))
    rendered = renderer.render(chat("Hi", "Hello\n", "And?", " Bye", system="Be brief."))
    assert renderer.template == "chatml"
    assert rendered.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello\n<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n Bye<|im_end|>"
    )
    assert learnt(rendered) == ["Hello\n<|im_end|>", " Bye<|im_end|>"]
    assert rendered.stops == ("<|im_end|>", "<|im_end|>")
    assert rendered.prompt == rendered.text.removesuffix(" Bye<|im_end|>")
    assert rendered.answer == " Bye"


def test_plain_is_chosen_where_nothing_else_can_be(tokenizers: Tokenizers, chat: Make) -> None:
    renderer = Renderer(tokenizers("llama2-tokenizer"))
    rendered = renderer.render(chat("Hi", "Hello", "And?", "Bye", system="Be brief."))
    assert renderer.template == "plain"
    assert rendered.text == (
        "### Setting\nBe brief.\n\n### Request\nHi\n\n### Reply\nHello</s>\n\n"
        "### Request\nAnd?\n\n### Reply\nBye</s>"
    )
    assert learnt(rendered) == ["Hello</s>", "Bye</s>"]


def test_the_tokenizers_own_template_comes_first(templated: Templated, chat: Make) -> None:
    renderer = Renderer(templated("llama2-tokenizer", "llama2"))
    rendered = renderer.render(chat("Hi", " Hello", "And?", "Bye"))
    assert renderer.template == "tokenizer"
    assert rendered.text == "<s>[INST] Hi [/INST] Hello </s><s>[INST] And? [/INST] Bye </s>"
    assert learnt(rendered) == [" Hello </s>", " Bye </s>"]
    assert rendered.prompt == "<s>[INST] Hi [/INST] Hello </s><s>[INST] And? [/INST]"
    assert rendered.answer == "Bye"


def test_our_chatml_is_what_a_chatml_template_writes(
    tokenizers: Tokenizers, templated: Templated, chat: Make
) -> None:
    ours, theirs = Renderer(tokenizers("base-11m")), Renderer(templated("base-11m", "chatml"))
    assert (ours.template, theirs.template) == ("chatml", "tokenizer")
    for row in (chat("Hi", "Hello"), chat("Hi", " Hello \n", "a", ">", "b", "<|", system=" s ")):
        assert ours.render(row) == theirs.render(row)
        messages = row.messages or ()
        assert ours.prompt(messages[:-1]) == theirs.prompt(messages[:-1]) == ours.render(row).prompt


def test_a_completion_is_joined_as_it_is_and_ended_once(tokenizers: Tokenizers, completion: Make) -> None:
    renderer = Renderer(tokenizers("llama2-tokenizer"))
    for answer in (" 4", " 4</s>"):
        rendered = renderer.render(completion("2+2=", answer))
        assert rendered.text == "2+2= 4</s>"
        assert learnt(rendered) == [" 4</s>"]
        assert (rendered.prompt, rendered.answer) == ("2+2=", " 4")


def test_a_text_is_learnt_whole_and_ended_once(tokenizers: Tokenizers) -> None:
    renderer = Renderer(tokenizers("base-11m"))
    for content in ("Once.", "Once.<|endoftext|>"):
        rendered = renderer.render(Row(None, content, "rows.jsonl", 1, "text"))
        assert rendered.text == "Once.<|endoftext|>"
        assert learnt(rendered) == [rendered.text]
        assert rendered.prompt is rendered.answer is None


def test_the_first_of_several_ending_tokens_is_the_stop(templated: Templated, chat: Make) -> None:
    ends_text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}\n{% endif %}"
    )
    renderer = Renderer(templated("base-11m", ends_text))
    for answer in ("Hello", ">", "|>", "x<"):
        rendered = renderer.render(chat("Hi", answer, "b", answer))
        assert learnt(rendered) == [f"{answer}<|im_end|>"] * 2
        assert rendered.text.endswith(f"{answer}<|im_end|>")
    assert renderer.stops == ("<|endoftext|>", "<|im_end|>")


def test_an_answer_that_ends_in_a_plain_added_token_keeps_it(templated: Templated, chat: Make) -> None:
    tokenizer = templated("base-11m", "chatml")
    tokenizer.add_tokens(["</call>"])
    assert learnt(Renderer(tokenizer).render(chat("Hi", "go</call>"))) == ["go</call><|im_end|>"]


def test_what_a_template_writes_before_an_answer_is_learnt(templated: Templated, chat: Make) -> None:
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = Renderer(templated("base-11m", thinks)).render(chat("Hi", "Hello"))
    assert learnt(rendered) == ["<think></think>Hello<|im_end|>"]


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
BROKEN_TEMPLATES = {
    "no stop token": (HEAD + "{{ m.content }}\n" + TAIL, "HB207", "no stop token after message 2"),
    "stop token as mere text": (
        HEAD + "{{ m.content }}<|end|>\n" + TAIL,
        "HB206",
        "does not write message 2 as it is",
    ),
    "stop only after the last answer": (
        HEAD + "{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}" + TAIL,
        "HB206",
        "otherwise once it is answered",
    ),
    "generation prompt that the answer lacks": (
        HEAD + "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}",
        "HB206",
        "writes what precedes message 2 otherwise",
    ),
    "no generation prompt": (
        HEAD + "{{ m.content }}<|im_end|>{% endfor %}",
        "HB206",
        "ignores add_generation_prompt for message 2",
    ),
    "answer in capitals": (
        HEAD + "{{ m.content | upper }}<|im_end|>" + TAIL,
        "HB206",
        "does not write message 2",
    ),
    "answer left out": (
        HEAD + "{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>" + TAIL,
        "HB206",
        "does not write message 2 as it is",
    ),
    "earlier answers rewritten": (
        HEAD
        + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>"
        + TAIL,
        "HB206",
        "rewrites earlier answers",
    ),
    "number of turns in the heading": (
        "{{ messages | length }}" + HEAD + "{{ m.content }}<|im_end|>" + TAIL,
        "HB206",
        "otherwise once it is answered",
    ),
    "refusal": (
        "{{ raise_exception('no thanks') }}",
        "HB206",
        "the chat template fails: TemplateError: no thanks",
    ),
    "not jinja": ("{% for %}", "HB206", "the chat template fails: TemplateSyntaxError"),
    "division by zero": ("{{ 1 // 0 }}", "HB206", "the chat template fails: ZeroDivisionError"),
    "reach for the interpreter": (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "HB206",
        "the chat template fails: SecurityError",
    ),
}


@pytest.mark.parametrize("name", BROKEN_TEMPLATES)
def test_a_template_whose_answers_are_uncertain_is_refused(
    templated: Templated, chat: Make, name: str
) -> None:
    template, code, said = BROKEN_TEMPLATES[name]
    error = refused(Renderer(templated("base-11m", template)), chat("Hi", "Hello", "And?", "Bye"))
    assert error.code == code
    assert said in error.what


def test_a_control_token_in_a_message_is_refused(
    tokenizers: Tokenizers, completion: Make, chat: Make
) -> None:
    renderer = Renderer(tokenizers("base-11m"))
    for row in (chat("Hi<|im_end|>", "a"), chat("Hi", "a<|endoftext|>b"), chat("Hi", "a", system="<|pad|>")):
        assert refused(renderer, row).code == "HB210"
    assert learnt(renderer.render(completion("<|im_start|>user\nHi", "a"))) == ["a<|endoftext|>"]


def test_all_rows_a_template_fails_on_are_named(templated: Templated, chat: Make) -> None:
    renderer = Renderer(templated("llama2-tokenizer", "llama2"))
    rows = [chat("a", "b", line=1), chat("a", "b", system="s", line=2), chat("a</s>", "b", line=3)]
    with pytest.raises(DataError) as caught:
        tokenise_rows(rows, renderer, 1000)
    said = str(caught.value)
    assert "2 of 3 rows" in said
    assert "rows.jsonl:2: the chat template fails: TemplateError: only user and assistant here" in said
    assert "rows.jsonl:3: message 1 holds '</s>'" in said
    assert [e.id for e in tokenise_rows(rows[:1], renderer, 1000).examples] == [rows[0].id]


def test_a_format_the_tokenizer_cannot_write_is_refused(tokenizers: Tokenizers, templated: Templated) -> None:
    for template, code, said in (
        ("chatml", "HB226", "the vocabulary lacks <|im_start|>, <|im_end|>, which chatml needs"),
        ("tokenizer", "HB206", "has no chat template"),
        ("vicuna", "HB206", "got template 'vicuna', expected one of auto, tokenizer, chatml, plain"),
    ):
        with pytest.raises(DataError, match=re.escape(said)) as caught:
            Renderer(tokenizers("llama2-tokenizer"), template)  # type: ignore[arg-type]
        assert caught.value.code == code
    endless = templated("base-11m", "chatml")
    endless.eos_token = None
    with pytest.raises(DataError, match="HB209"):
        Renderer(endless)


def test_a_format_may_be_chosen_over_the_tokenizers_own(templated: Templated) -> None:
    assert Renderer(templated("base-11m", "llama2"), "chatml").template == "chatml"
    assert Renderer(templated("base-11m", "llama2"), "plain").stops == ("<|endoftext|>",)


def test_a_conversation_that_begins_with_an_answer_is_written(tokenizers: Tokenizers) -> None:
    row = Row((Message("assistant", "Welcome."),), None, "rows.jsonl", 1)
    rendered = Renderer(tokenizers("base-11m")).render(row)
    assert (rendered.prompt, learnt(rendered)) == ("<|im_start|>assistant\n", ["Welcome.<|im_end|>"])
