"""A row written out as the text a model sees, with the exact characters it is to learn.

It owns chat formats and where an answer begins and ends in them; it must not know token ids or lengths.

The trained characters of a conversation are, for every assistant turn, what follows the generation prompt up
to and including the turn's stop token: just what the model has to produce when it is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

from halfbyte.data.answers import Answers, Ask, Endings, marked_answers, prove_answers
from halfbyte.data.row import Json, Message, Row
from halfbyte.data.sandbox import Job, run_template
from halfbyte.data.templates import FORMATS, named_template
from halfbyte.errors import DataError
from halfbyte.settings import TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES: tuple[TemplateName, ...] = get_args(TemplateName)
PROBE = (Message("user", "Is this a question?"), Message("assistant", "This is an answer."))
MARKS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Rendered:
    """A row as text.

    Attributes:
        text: What the model sees, up to the last stop token.
        trained: Begin and end of each stretch of characters to learn, in order.
        stops: Text of the stop token that ends each stretch.
        prompt: Text up to where the last answer begins, to generate from; None for a text row.
        answer: The last answer, verbatim; None for a text row, and for an answer that calls tools.
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

    def last_answer_only(self) -> Rendered:
        """The same text with nothing to learn but its last answer."""
        return replace(self, trained=self.trained[-1:], stops=self.stops[-1:])


class Renderer:
    """Writes rows out as text for one tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        template: Chat format: `tokenizer` is the tokenizer's own, run in transformers' sandbox within limits;
            `auto` takes the tokenizer's own, else chatml where its tokens are in the vocabulary, else plain;
            any other is the format of that name.

    Attributes:
        tokenizer: As given.
        template: The chat format in use, never `auto`.
        template_text: All that the chat format writes: the tokenizer's template, or as JSON its several templates
            or the named format.

    Raises:
        DataError: HB206 if there is no such chat format, HB226 if the vocabulary lacks its tokens, HB209 if the
            tokenizer has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateName = "auto") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        tokens = {token.content for token in added if token.content.strip()} | special
        self._endings = Endings(tuple(sorted(tokens)))
        self._control = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        )
        if not tokenizer.eos_token:
            what = "the tokenizer has no end-of-text token"
            raise DataError("HB209", what, fix="set eos_token in tokenizer_config.json")
        self._eos = str(tokenizer.eos_token)
        self.template = self._choose(template)
        self._own = named_template(self.template, self._eos)
        source = tokenizer.chat_template if self._own is None else asdict(self._own)
        text = json.dumps(source, default=sorted, sort_keys=True)
        self.template_text = source if isinstance(source, str) else text

    def _choose(self, template: TemplateName) -> TemplateName:
        if template not in TEMPLATES:
            what = f"got template {template!r}, expected one of {', '.join(TEMPLATES)}"
            raise DataError("HB206", what, fix="set data.template to one of them")
        has_own = bool(self.tokenizer.chat_template)
        if template == "auto":
            return "tokenizer" if has_own else "plain" if self._lacks("chatml") else "chatml"
        if template == "tokenizer" and not has_own:
            raise DataError("HB206", "the tokenizer has no chat template", fix="set data.template to auto")
        if lacks := self._lacks(template):
            what = f"the vocabulary lacks {', '.join(lacks)}, which {template} needs as single tokens"
            raise DataError("HB226", what, fix="set data.template to auto or plain, or use another model")
        return template

    def _lacks(self, template: TemplateName) -> list[str]:
        needs = FORMATS[template].needs if template in FORMATS else ()
        return [token for token in needs if token not in self._endings.tokens]

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """Tokens at which a generated answer ends: the end of text, and the chat format's end of a turn.

        Raises:
            DataError: HB206, HB207 or HB222 to HB224 if the chat template cannot be used.
        """
        return tuple(dict.fromkeys((self._eos, self._turn_stop)))

    @cached_property
    def _turn_stop(self) -> str:
        if self._own is not None:
            return self._own.stop
        return self._answers_of_jinja(PROBE, self._endings).stops[-1]

    def prompt(self, messages: Sequence[Message]) -> str:
        """A conversation as text up to where the assistant's next answer begins.

        Raises:
            DataError: HB206, HB222 or HB223 if the chat template cannot be used, HB225 if the chat format has
                no place for a turn.
        """
        if self._own is not None:
            return self._own.prompt(messages)
        return run_template(self._job(messages, (), [(len(messages), True)])).texts[0]

    def render(self, row: Row) -> Rendered:
        """Write a row out.

        Raises:
            DataError: HB206 if the chat template fails on the row, or its answers cannot be found for certain
                in what it wrote; HB207 if an answer is not followed by a stop token; HB210 if a message holds
                a token that steers the model; HB222 or HB223 if the template goes beyond its limits; HB224 if
                its marks are not the answers; HB225 if the chat format has no place for a turn.
        """
        try:
            return self._render(row)
        except DataError as error:
            raise DataError(error.code, error.what, where=row.where, fix=error.fix) from error

    def _render(self, row: Row) -> Rendered:
        if row.messages is None:
            text = self._with_eos(row.text or "")
            return Rendered(text, ((0, len(text)),), (self._eos,), None, None, row.where, row.id)
        answer: str | None = row.messages[-1].content
        if row.style == "completion":
            prompt = "".join(m.content for m in row.messages[:-1])
            text = self._with_eos(prompt + row.messages[-1].content)
            answers = Answers(text, ((len(prompt), len(text)),), (self._eos,), len(prompt))
            answer = row.messages[-1].content.removesuffix(self._eos)
        else:
            self.refuse_control_tokens(row)
            answers = self._answers(row.messages, row.tools)
            answer = None if row.messages[-1].tool_calls else answer
        prompt = answers.text[: answers.prompt_end]
        return Rendered(answers.text, answers.spans, answers.stops, prompt, answer, row.where, row.id)

    def _with_eos(self, text: str) -> str:
        return text if text.endswith(self._eos) else text + self._eos

    def refuse_control_tokens(self, row: Row) -> None:
        """Refuse a conversation in which a message holds a token that steers the model: HB210."""
        words = {"the row's list of tools": json.dumps(row.tools, ensure_ascii=False)} if row.tools else {}
        for number, message in enumerate(row.messages or (), start=1):
            facts = message.tool_facts
            told = json.dumps(facts, ensure_ascii=False) if facts else ""
            words[f"message {number}"] = message.content + told
        for place, text in words.items():
            if found := self._control.search(text):
                what = f"{place} holds {found[0]!r}, which the tokenizer reads as a control token"
                raise DataError("HB210", what, fix="remove it from the message, or give the row as text")

    def _answers(self, messages: Sequence[Message], tools: Sequence[Json] = ()) -> Answers:
        if self._own is None:
            endings = Endings(self._endings.tokens, self._turn_stop)
            return self._answers_of_jinja(messages, endings, tools)
        text, spans = self._own.write(messages, tools)
        stops = (self._own.stop,) * len(spans)
        return Answers(text[: spans[-1][1]], tuple(spans), stops, spans[-1][0])

    def _answers_of_jinja(
        self, messages: Sequence[Message], endings: Endings, tools: Sequence[Json] = ()
    ) -> Answers:
        def apply(asks: Sequence[Ask]) -> list[str]:
            return run_template(self._job(messages, tools, asks)).texts

        job = self._job(messages, tools, [(len(messages), False)], marks=True)
        if not MARKS.search(job.template):
            return prove_answers(messages, apply, endings)
        written = run_template(job)
        return marked_answers(messages, written.texts[0], written.marks, apply, endings)

    def _job(
        self, messages: Sequence[Message], tools: Sequence[Json], asks: Sequence[Ask], *, marks: bool = False
    ) -> Job:
        """The tokenizer's own template on beginnings of a conversation."""
        try:
            text = str(self.tokenizer.get_chat_template(tools=list(tools) or None))
        except ValueError as error:
            what = "the tokenizer has several chat templates and none by default"
            raise DataError("HB206", what, fix="set data.template to a format by name") from error
        turns: list[Json] = [{"role": m.role, "content": m.content, **m.tool_facts} for m in messages]
        tokens = dict(self.tokenizer.special_tokens_map)
        return Job(text, tokens, turns, list(tools) or None, asks, marks)
