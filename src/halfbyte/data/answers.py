"""Where the answers are in what a tokenizer's chat template wrote, and the token that ends each.

It owns the proof that a stretch of text is an answer, and what a template's own marks may say of it; it must not
know how a template is run, or token ids.

Two ways lead to the answers. Without marks, each is what stands between the text that asks for it and the text
that holds it. Where a template marks what the model writes (`{% generation %}`), its marks are taken, and held
against the first way wherever that finds the answers too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from halfbyte.data.row import Message
from halfbyte.errors import DataError

Ask = tuple[int, bool]
"""How many of the messages to write, and whether the generation prompt follows."""
Apply = Callable[[Sequence[Ask]], list[str]]

TEMPLATE_FIX = "mend the chat template, or set data.template to a format by name"
SPLIT_FIX = "give one row per answer, or set data.template to a format by name"


@dataclass(frozen=True)
class Answers:
    """A conversation as text.

    Attributes:
        text: The conversation up to the last stop token.
        spans: Begin and end of each stretch to learn, in order.
        stops: Text of the stop token that ends each stretch.
        prompt_end: Where the text ends that asks for the last answer.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    stops: tuple[str, ...]
    prompt_end: int


@dataclass(frozen=True)
class Endings:
    """Tokens that may end an answer.

    Attributes:
        tokens: Every added token that is not blank. A stop token need not be flagged special: some fine-tunes
            add theirs as a plain one.
        turn: The token known to end this template's turns; None before it is known.
    """

    tokens: tuple[str, ...]
    turn: str | None = None

    def trailing(self, text: str, after: int) -> list[tuple[int, int]]:
        """Begin and end of each token that ends a text, the last one first; blanks may stand between them."""
        found, rest = [], text.rstrip()
        while (token := self._last(rest)) and len(rest) - len(token) >= after:
            found.append((len(rest) - len(token), len(rest)))
            rest = rest.removesuffix(token).rstrip()
        return found

    def _last(self, text: str) -> str:
        return max((token for token in self.tokens if text.endswith(token)), key=len, default="")


def prove_answers(messages: Sequence[Message], apply: Apply, endings: Endings) -> Answers:
    """Find each answer between the text that asks for it and the text that holds it.

    Only what is proven is used: the text that asks must begin the text that holds, and each answered
    conversation must begin the longer ones.

    Args:
        messages: The conversation, an answer its last.
        apply: Writes beginnings of it.
        endings: Tokens that may end an answer.

    Raises:
        DataError: HB206 if an answer cannot be found for certain, HB207 if no stop token follows it.
    """
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    texts = apply([ask for turn in turns for ask in ((turn, True), (turn + 1, False))])
    spans, stops = [], []
    for turn, prompt, text in zip(turns, texts[::2], texts[1::2], strict=True):
        if not text.startswith(prompt):
            what = f"the chat template writes what precedes message {turn + 1} otherwise once it is answered"
            raise DataError("HB206", what, fix=SPLIT_FIX)
        begin, end, stop = _find_answer(text, len(prompt), messages[turn], turn + 1, endings)
        if text[len(prompt) : begin].strip() and apply([(turn, False)]) == [prompt]:
            what = f"the chat template ignores add_generation_prompt for message {turn + 1}"
            raise DataError("HB206", what, fix=TEMPLATE_FIX)
        spans.append((len(prompt), end))
        stops.append(stop)
    if not all(texts[-1].startswith(text[:end]) for text, (_, end) in zip(texts[1::2], spans, strict=True)):
        what = "the chat template rewrites earlier answers in a longer conversation"
        raise DataError("HB206", what, fix=SPLIT_FIX)
    return Answers(texts[-1][: spans[-1][1]], tuple(spans), tuple(stops), spans[-1][0])


def _find_answer(
    text: str, after: int, message: Message, number: int, endings: Endings
) -> tuple[int, int, str]:
    """Where the answer that ends a text begins, where its stop token ends, and that token.

    Several tokens may end the text (an end of turn, then an end of text): the stop token is the first of
    them, found by taking them off from the end for as long as the answer is still there.
    """
    if message.tool_calls:
        return _find_calls(text, after, message, number, endings)
    content, found = message.content.strip(), None
    for begin, end in endings.trailing(text, after):
        rest = text[:begin].rstrip()
        if rest.endswith(content) and len(rest) - len(content) >= after:
            found = len(rest) - len(content), end, text[begin:end]
    if found:
        return found
    if text.rstrip().endswith(content):
        what = f"the chat template writes no stop token after message {number}"
        raise DataError("HB207", what, fix=TEMPLATE_FIX)
    raise DataError("HB206", f"the chat template does not write message {number} as it is", fix=TEMPLATE_FIX)


def _find_calls(
    text: str, after: int, message: Message, number: int, endings: Endings
) -> tuple[int, int, str]:
    """As `_find_answer` for an answer that calls tools, which every template writes in words of its own.

    What can be held against it are the words said beside the calls and the names of the tools, in order.
    """
    ends = [(b, e) for b, e in endings.trailing(text, after) if text[b:e] == endings.turn]
    if not ends:
        what = f"the chat template writes no stop token after message {number}"
        raise DataError("HB207", what, fix=TEMPLATE_FIX)
    begin, end = ends[-1]
    at = after
    for call in message.tool_calls:
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        at = text.find(str(name), at, begin) if name else -1
        if at < 0:
            break
        at += len(str(name))
    if at < 0 or message.content.strip() not in text[after:begin]:
        what = f"the chat template does not write message {number} and its tool calls as they are"
        raise DataError("HB206", what, fix=TEMPLATE_FIX)
    return after, end, text[begin:end]


def marked_answers(
    messages: Sequence[Message],
    text: str,
    marks: Sequence[tuple[int, int]],
    apply: Apply,
    endings: Endings,
) -> Answers:
    """Take the answers that a template marks, and hold them against the proof where there is one.

    Marks may leave out an answer or its head, which are then not learnt. They may hold the blanks around an
    answer, which are not learnt either: the generation prompt gives the ones before, nobody asks for the ones
    behind.

    Args:
        messages: The conversation, an answer its last.
        text: All of it as the template wrote it.
        marks: Begin and end of each marked stretch.
        apply: Writes beginnings of the conversation.
        endings: Tokens that may end an answer; the one that ends a turn is known.

    Raises:
        DataError: HB207 if the marks leave out a stop token, HB224 if they disagree with the answers, HB206 if
            the last answer's prompt is written otherwise once it is answered.
    """
    stretches = [_to_stop(text, begin, end, endings) for begin, end in _joined(text, marks)]
    answers = _spans_of_answers(messages, text, stretches, apply, endings)
    agreed = [_agreed(text, stretch, answers) for stretch in stretches]
    if not agreed or agreed[-1].end != answers[-1][1]:
        raise DataError("HB224", "the chat template does not mark the last answer", fix=TEMPLATE_FIX)
    spans = tuple((stretch.begin, stretch.end) for stretch in agreed)
    return Answers(text[: agreed[-1].end], spans, tuple(s.stop for s in agreed), answers[-1][0])


@dataclass(frozen=True)
class _Stretch:
    """Marked text, up to the stop token that ends it."""

    begin: int
    end: int
    stop: str


def _joined(text: str, marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marked stretches that are not blank, those with only blanks between them as one."""
    joined: list[tuple[int, int]] = []
    for begin, end in marks:
        goes_on = joined and not text[joined[-1][1] : begin].strip()
        joined.append((joined.pop()[0] if goes_on else begin, end))
    return [(begin, end) for begin, end in joined if text[begin:end].strip()]


def _to_stop(text: str, begin: int, end: int, endings: Endings) -> _Stretch:
    """A marked stretch up to its stop token: the first end of a turn among the tokens that end it."""
    tokens = [(e, text[b:e]) for b, e in endings.trailing(text[:end], begin)]
    ends = [(e, token) for e, token in tokens if endings.turn in (None, token)]
    if not ends:
        shown = text[begin:end][-40:]
        what = f"the chat template's {{% generation %}} marks leave out the stop token after {shown!r}"
        raise DataError("HB207", what, fix=TEMPLATE_FIX)
    return _Stretch(begin, *ends[-1])


def _spans_of_answers(
    messages: Sequence[Message], text: str, stretches: Sequence[_Stretch], apply: Apply, endings: Endings
) -> list[tuple[int, int]]:
    """Where the answers are, by proof where the template allows it.

    A template that rewrites earlier answers allows it for the last one's beginning only: the rest is taken from
    its marks.
    """
    try:
        return list(prove_answers(messages, apply, endings).spans)
    except DataError as error:
        if error.code != "HB206":
            raise
    (prompt,) = apply([(len(messages) - 1, True)])
    if not text.startswith(prompt):
        what = f"the chat template writes what precedes message {len(messages)} otherwise once it is answered"
        raise DataError("HB206", what, fix=TEMPLATE_FIX)
    answers = [(s.begin, s.end) for s in stretches[:-1] if _holds_an_answer(text, s, messages)]
    end = stretches[-1].end if stretches else 0
    whole = messages[-1].content.strip() in text[len(prompt) : end]
    return [*answers, (len(prompt), end if whole else len(text))]


def _holds_an_answer(text: str, stretch: _Stretch, messages: Sequence[Message]) -> bool:
    """Whether a stretch is an answer with more around it, or what the template keeps of one."""
    said = text[stretch.begin : stretch.end].strip().removesuffix(stretch.stop).strip()
    answers = [message.content.strip() for message in messages if message.role == "assistant"]
    return any(answer in said or said in answer for answer in answers)


def _agreed(text: str, stretch: _Stretch, answers: Sequence[tuple[int, int]]) -> _Stretch:
    """A marked stretch as it is learnt, if it lies in an answer and ends as that does."""
    for begin, end in answers:
        if stretch.end == end and stretch.begin < begin and not text[stretch.begin : begin].strip():
            return replace(stretch, begin=begin)
        if stretch.end == end and stretch.begin >= begin:
            return stretch if text[begin : stretch.begin].strip() else replace(stretch, begin=begin)
    shown = text[stretch.begin : stretch.end][:60]
    what = f"the chat template marks {shown!r} as generated, which is not an answer as it is asked for"
    raise DataError("HB224", what, fix=TEMPLATE_FIX)
