"""A row written out as the text a model sees, with the exact characters it is to learn.

It owns chat formats and where an answer begins and ends in them; it must not know token ids or lengths.

The trained characters of a conversation are, for every assistant turn, what follows the generation prompt up
to and including the turn's stop token: just what the model has to produce when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from halfbyte.data.row import Message, Row
from halfbyte.errors import DataError, listed
from halfbyte.settings import TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES: tuple[TemplateName, ...] = get_args(TemplateName)
PROBE = (Message("user", "Is this a question?"), Message("assistant", "This is an answer."))
TEMPLATE_FIX = "mend the chat template, or set data.template to chatml or plain"
SPLIT_FIX = "give one row per answer, or set data.template to chatml or plain"


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: What the model sees, up to the last stop token.
        trained: Begin and end of each stretch of characters to learn, in order.
        stops: Text of the stop token that ends each stretch.
        prompt: Text up to where the last answer begins, to generate from; None for a text row.
        answer: The last answer, verbatim; None for a text row.
        where: `file:line` of the row.
        id: Content hash of the row.
    """

    text: str
    trained: tuple[tuple[int, int], ...]
    stops: tuple[str, ...]
    prompt: str | None
    answer: str | None
    where: str
    id: str


@dataclass(frozen=True)
class TurnTemplate:
    """A chat format of our own: text before and after each turn.

    Attributes:
        before: Text before a turn's content, by role; the assistant's is the generation prompt.
        after: Text after a turn's content, by role; the assistant's begins with the stop token.
        stop: Text of the token that ends an answer.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    stop: str


@dataclass(frozen=True)
class _Answers:
    """A conversation as text: where its answers are, and the token that ends each."""

    text: str
    spans: tuple[tuple[int, int], ...]
    stops: tuple[str, ...]


class Renderer:
    """Writes rows out as text for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        template: Chat format: `tokenizer` is the tokenizer's own, run in transformers' sandbox; `chatml` and
            `plain` are ours; `auto` takes the tokenizer's own, else chatml where its tokens are in the
            vocabulary, else plain.

    Attributes:
        tokenizer: As given.
        template: The chat format in use, never `auto`.

    Raises:
        DataError: HB206 if the tokenizer lacks what the chat format needs, HB209 if it has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateName = "auto") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        # A stop token need not be flagged special: some fine-tunes add theirs as a plain one. Blank added
        # tokens are stretches of indentation, which end nothing.
        self._stops = tuple(sorted({token.content for token in added if token.content.strip()} | special))
        self._control = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        )
        self.template = self._choose(template)
        self._eos = tokenizer.eos_token
        if not self._eos:
            raise DataError(
                "HB209",
                "the tokenizer has no end-of-text token",
                fix="set eos_token in tokenizer_config.json",
            )
        self._own = _own_template(self.template, self._eos)

    def _choose(self, template: TemplateName) -> TemplateName:
        if template not in TEMPLATES:
            what = f"got template {template!r}, expected one of {', '.join(TEMPLATES)}"
            raise DataError("HB206", what, fix="set data.template to one of them")
        has_own = bool(self.tokenizer.chat_template)
        has_chatml = {"<|im_start|>", "<|im_end|>"} <= set(self._stops)
        if template == "auto":
            return "tokenizer" if has_own else "chatml" if has_chatml else "plain"
        if template == "tokenizer" and not has_own:
            raise DataError("HB206", "the tokenizer has no chat template", fix="set data.template to auto")
        if template == "chatml" and not has_chatml:
            what = "the vocabulary lacks <|im_start|> and <|im_end|>, which chatml needs"
            raise DataError("HB206", what, fix="set data.template to auto or plain")
        return template

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Tokens at which a generated answer ends: the end of text, and the chat format's end of a turn.

        Raises:
            DataError: HB206 or HB207 if the chat template cannot be used.
        """
        return tuple(dict.fromkeys((self._eos, *self._answers(PROBE).stops)))

    def prompt(self, messages: Sequence[Message]) -> str:
        """A conversation as text up to where the assistant's next answer begins.

        Raises:
            DataError: HB206 if the chat template cannot be used.
        """
        if self._own is None:
            return self._apply(messages, generate=True)
        turns = [self._own.before[m.role] + m.content + self._own.after[m.role] for m in messages]
        return "".join(turns) + self._own.before["assistant"]

    def render(self, row: Row) -> Rendered:
        """Write a row out.

        Raises:
            DataError: HB206 if the chat template fails on the row, or its answers cannot be found for certain
                in what it wrote; HB207 if an answer is not followed by a stop token; HB210 if a message holds
                a token that steers the model.
        """
        try:
            return self._render(row)
        except DataError as error:
            raise DataError(error.code, error.what, where=row.where, fix=error.fix) from error

    def _render(self, row: Row) -> Rendered:
        if row.messages is None:
            text = self._with_eos(row.text or "")
            return Rendered(text, ((0, len(text)),), (self._eos,), None, None, row.where, row.id)
        answer = row.messages[-1].content
        if row.style == "completion":
            prompt = "".join(m.content for m in row.messages[:-1])
            text = self._with_eos(prompt + answer)
            answers = _Answers(text, ((len(prompt), len(text)),), (self._eos,))
            answer = answer.removesuffix(self._eos)
        else:
            self._refuse_control_tokens(row.messages)
            answers = self._answers(row.messages)
        prompt = answers.text[: answers.spans[-1][0]]
        return Rendered(answers.text, answers.spans, answers.stops, prompt, answer, row.where, row.id)

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            if found := self._control.search(message.content):
                what = f"message {number} holds {found[0]!r}, which the tokenizer reads as a control token"
                raise DataError("HB210", what, fix="remove it from the message, or give the row as text")

    def _answers(self, messages: Sequence[Message]) -> _Answers:
        return (
            self._answers_of_jinja(messages)
            if self._own is None
            else self._answers_of_own(messages, self._own)
        )

    def _answers_of_own(self, messages: Sequence[Message], template: TurnTemplate) -> _Answers:
        text, spans = "", []
        for message in messages:
            begin = len(text) + len(template.before[message.role])
            text += template.before[message.role] + message.content + template.after[message.role]
            if message.role == "assistant":
                spans.append((begin, begin + len(message.content) + len(template.stop)))
        return _Answers(text[: spans[-1][1]], tuple(spans), (template.stop,) * len(spans))

    def _answers_of_jinja(self, messages: Sequence[Message]) -> _Answers:
        """Find each answer between the text that asks for it and the text that holds it.

        Only what is proven is used: the text that asks must begin the text that holds, and each answered
        conversation must begin the longer ones.
        """
        text, spans, stops, heads = "", [], [], []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._apply(messages[:turn], generate=True)
            text = self._apply(messages[: turn + 1], generate=False)
            if not text.startswith(prompt):
                what = (
                    f"the chat template writes what precedes message {turn + 1} otherwise once it is answered"
                )
                raise DataError("HB206", what, fix=SPLIT_FIX)
            begin, end, stop = self._find_answer(text, len(prompt), message.content.strip(), turn + 1)
            if text[len(prompt) : begin].strip() and self._apply(messages[:turn], generate=False) == prompt:
                what = f"the chat template ignores add_generation_prompt for message {turn + 1}"
                raise DataError("HB206", what, fix=TEMPLATE_FIX)
            spans.append((len(prompt), end))
            stops.append(stop)
            heads.append(text[:end])
        if not all(text.startswith(head) for head in heads):
            what = "the chat template rewrites earlier answers in a longer conversation"
            raise DataError("HB206", what, fix=SPLIT_FIX)
        return _Answers(heads[-1], tuple(spans), tuple(stops))

    def _find_answer(self, text: str, after: int, content: str, number: int) -> tuple[int, int, str]:
        """Where the answer that ends a text begins, where its stop token ends, and that token.

        Several tokens may end the text (an end of turn, then an end of text): the stop token is the first of
        them, found by taking them off from the end for as long as the answer is still there.
        """
        rest, found = text.rstrip(), None
        while (stop := self._trailing_stop(rest)) and len(rest) - len(stop) >= after:
            end, rest = len(rest), rest.removesuffix(stop).rstrip()
            if rest.endswith(content) and len(rest) - len(content) >= after:
                found = len(rest) - len(content), end, stop
        if found:
            return found
        if text.rstrip().endswith(content):
            what = f"the chat template writes no stop token after message {number}"
            raise DataError("HB207", what, fix=TEMPLATE_FIX)
        raise DataError(
            "HB206", f"the chat template does not write message {number} as it is", fix=TEMPLATE_FIX
        )

    def _trailing_stop(self, text: str) -> str:
        """The longest added token that ends a text, or an empty text."""
        return max((stop for stop in self._stops if text.endswith(stop)), key=len, default="")

    def _apply(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The tokenizer's own template on some messages, in transformers' sandbox."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generate}
        try:
            return str(self.tokenizer.apply_chat_template(turns, **arguments))
        except Exception as error:  # a stranger's program may raise anything
            what = f"the chat template fails: {type(error).__name__}: {error}"
            raise DataError(
                "HB206", what, fix="mend the row or the template, or set data.template"
            ) from error


def _own_template(name: TemplateName, eos: str) -> TurnTemplate | None:
    """The named chat format of our own; None for the tokenizer's."""
    if name == "chatml":
        roles = ("system", "user", "assistant")
        before = {role: f"<|im_start|>{role}\n" for role in roles}
        return TurnTemplate(before, dict.fromkeys(roles, "<|im_end|>\n"), "<|im_end|>")
    if name == "plain":
        before = {"system": "### Setting\n", "user": "### Request\n", "assistant": "### Reply\n"}
        return TurnTemplate(before, {"system": "\n\n", "user": "\n\n", "assistant": f"{eos}\n\n"}, eos)
    return None


def render_rows(rows: Sequence[Row], renderer: Renderer) -> list[Rendered]:
    """Write all rows out.

    Raises:
        DataError: With the code of the first faulty row; names every faulty row.
    """
    rendered: list[Rendered] = []
    errors: list[DataError] = []
    for row in rows:
        try:
            rendered.append(renderer.render(row))
        except DataError as error:
            errors.append(error)
    if errors:
        faults = [f"{error.where}: {error.what}" for error in errors]
        what = f"{len(faults)} of {len(rows)} rows" + listed(faults)
        raise DataError(errors[0].code, what, fix=errors[0].fix)
    return rendered
