"""Text to token ids, with a mask of the tokens to learn that is exact to the character.

It owns the mask, truncation and the ids that end an answer; it must not know chat formats or batches.

A token counts as trained if and only if its first character lies in a trained stretch. A token that begins in
the prompt and reaches into the answer is therefore not trained: the model is given the prompt's characters
and cannot be asked for a token that begins among them. Such rows are counted (`Tokenised.misaligned`), since
generation from the prompt alone then sees other tokens than training did.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.examples import Listed
from halfbyte.data.faults import Fault, Faults, Reading
from halfbyte.data.render import Rendered, Renderer
from halfbyte.data.row import Row
from halfbyte.data.text_faults import bos_fault, stop_fault
from halfbyte.data.tokenizer import Encoder, TextTokens
from halfbyte.data.truncation import refuse_none_left, refuse_too_many_cut
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000  # bounds the memory of the tokenizer's own records, which are far larger than ids


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    Attributes:
        input_ids: Token ids, int32, (T,).
        trained: Which tokens are targets, bool, (T,).
        prompt_ids: Ids to generate the last answer from, int32, (T',), never truncated; None for a text row.
        answer: The last answer, verbatim; None for a text row, and for an answer that calls tools.
        id: Content hash of the row.
        where: `file:line` of the row.
        truncated: Whether tokens were cut off.
        aligned: Whether the row's tokens begin with the prompt's, so that generation sees what training saw.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    prompt_ids: NDArray[np.int32] | None
    answer: str | None
    id: str
    where: str
    truncated: bool
    aligned: bool = True

    @property
    def tokens(self) -> int:
        """Tokens."""
        return len(self.input_ids)

    @property
    def longest(self) -> int:
        """Tokens that are read in one piece."""
        return len(self.input_ids)

    @property
    def sides(self) -> tuple[tuple[NDArray[np.int32], NDArray[np.bool_]], ...]:
        """The pieces it is shown to a person in: tokens, and which of them are targets."""
        return ((self.input_ids, self.trained),)

    @property
    def content(self) -> bytes:
        """Its tokens and which of them are targets."""
        return self.input_ids.tobytes() + self.trained.tobytes()

    @property
    def trained_tokens(self) -> int:
        """Targets that a causal model predicts: the first token has nothing before it."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Tokenised:
    """All tokenised rows of a set.

    Attributes:
        examples: In the order of the rows.
        truncated: Rows that were cut.
        misaligned: Rows in which a token straddles the border of prompt and answer.
        stop_ids: Ids at which generation ends: the stop tokens these rows teach, and the end of text.
    """

    examples: Listed[Example]
    truncated: int
    misaligned: int
    stop_ids: tuple[int, ...]


def stop_token_ids(renderer: Renderer) -> tuple[int, ...]:
    """Ids at which a generated answer ends, for a chat format with no rows at hand.

    Raises:
        DataError: HB206 or HB207 if the chat template cannot be used.
    """
    encoder = Encoder(renderer.tokenizer)
    return tuple(sorted(encoder.id_of(stop) for stop in renderer.stops))


def tokenise(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Tokenise one row; for many, `tokenise_rows` is far quicker.

    Args:
        rendered: The row as text.
        tokenizer: A fast transformers tokenizer.
        max_length: Tokens to keep, at least 2; the rest is cut off at the end.

    Raises:
        DataError: HB207 if a stop token is not a trained token; HB208 if no trained token is left; HB209 if
            the tokenizer gives no offsets; HB220 if the text begins twice.
    """
    tokeniser = Tokeniser(Encoder(tokenizer), max_length)
    [example] = tokeniser.examples([rendered])
    tokeniser.refuse()
    return example


def tokenise_rows(
    rows: Sequence[Row],
    renderer: Renderer,
    max_length: int,
    max_truncated: float = 1.0,
    *,
    last_answer_only: bool = False,
    reading: Reading | None = None,
) -> Tokenised:
    """Render and tokenise all rows; those of one place, such as the two answers of a pair, stay or go together.

    Args:
        rows: Checked rows.
        renderer: Writes them out, and holds the tokenizer.
        max_length: Tokens to keep of each row, at least 2; the rest is cut off at the end, and counted.
        max_truncated: Share of the rows that may be cut, 0 to 1.
        last_answer_only: Train no earlier answer of a conversation.
        reading: How many rows without a trained token may be skipped; gets those that were.

    Raises:
        DataError: As `Renderer.render` and `tokenise`, HB221 if too many rows are cut, each naming every such row;
            HB203 if all are skipped.
    """
    tokeniser = Tokeniser(Encoder(renderer.tokenizer), max_length, last_answer_only, reading)
    parts = (rows[at : at + ROWS_AT_ONCE] for at in range(0, len(rows), ROWS_AT_ONCE))
    examples = [example for part in parts for example in tokeniser.take(part, renderer)]
    tokeniser.refuse()
    wholes = np.array(tokeniser.wholes())
    if gone := {example.where for example in examples if not example.trained_tokens}:
        stay = [example.where not in gone for example in examples]
        examples, wholes = list(itertools.compress(examples, stay)), wholes[stay]
    if rows:
        refuse_none_left(len(examples), max_length)
    refuse_too_many_cut(wholes, max_length, max_truncated, lambda at: examples[at].where)
    return Tokenised(
        Listed(examples),
        truncated=sum(e.truncated for e in examples),
        misaligned=sum(not e.aligned for e in examples),
        stop_ids=tokeniser.stop_ids,
    )


class Tokeniser:
    """Makes examples of rows, part by part, and notes those that could not be learnt from until they are asked for.

    Args:
        encoder: The tokenizer.
        max_length: Tokens to keep of each row.
        last_answer_only: Train no earlier answer of a conversation.
        reading: How many rows without a trained token may be skipped; gets those that were.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        last_answer_only: bool = False,
        reading: Reading | None = None,
    ) -> None:
        self._encoder, self._max_length, self._last_answer_only = encoder, max_length, last_answer_only
        self._reading = reading or Reading()
        self._rows, self._last_row, self._last_untaught = 0, "", ""
        self._wholes = array("Q")
        self._stops: set[str] = set()
        self._unwritten: Faults[str] = Faults()
        self._first_error: DataError | None = None
        self._unended: Faults[str] = Faults()
        self._doubled: Faults[str] = Faults()
        self._untaught: Faults[Fault] = Faults(self._reading.allowed)

    def wholes(self, last: int = 0) -> list[int]:
        """Tokens that each example had before it was cut: of the last ones, or of all so far."""
        return self._wholes[-last:].tolist()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation ends: the stop tokens the rows so far teach, and the end of text."""
        return tuple(sorted({self._encoder.eos, *map(self._encoder.id_of, self._stops)}))

    def take(self, rows: Sequence[Row], renderer: Renderer) -> list[Example]:
        """Examples of some rows; those that cannot be written out have none."""
        rendered = []
        for row in rows:
            try:
                written = renderer.render(row)
                rendered.append(written.last_answer_only() if self._last_answer_only else written)
            except DataError as error:
                self._first_error = self._first_error or error
                self._unwritten.add(f"{error.where}: {error.what}")
                self._count(str(error.where))
        return self.examples(rendered)

    def examples(self, rendered: Sequence[Rendered]) -> list[Example]:
        """Examples of some rows that are written out, cut to `max_length`."""
        encoder, examples = self._encoder, []
        prompts = iter(encoder.encode([row.prompt for row in rendered if row.prompt is not None]))
        for row, tokens in zip(rendered, encoder.encode([row.text for row in rendered]), strict=True):
            prompt = next(prompts).ids if row.prompt is not None else None
            self._count(row.where)
            whole = _example(row, tokens, prompt, encoder)
            example = _cut(whole, self._max_length)
            self._wholes.append(len(whole.input_ids))
            self._stops.update(row.stops)
            if fault := stop_fault(row, tokens, encoder):
                self._unended.add(f"{row.where}: {fault}")
            if fault := bos_fault(row, whole.input_ids, encoder):
                self._doubled.add(f"{row.where}: {fault}")
            if example.trained_tokens == 0 and row.where != self._last_untaught:
                source, _, line = row.where.rpartition(":")
                self._untaught.add(Fault(source, int(line), self._untaught_reason(whole)))
                self._last_untaught = row.where
            examples.append(example)
        return examples

    def _count(self, where: str) -> None:
        self._rows += where != self._last_row
        self._last_row = where

    def _untaught_reason(self, whole: Example) -> str:
        if whole.trained_tokens == 0:
            return "it has no trained token at any length"
        first = whole.trained[1:].argmax() + 2
        return f"its first trained token is number {first}, and the first {self._max_length} are kept"

    def refuse(self) -> None:
        """Refuse all rows so far that could not be learnt from, those of the first kind there are, or skip them.

        Raises:
            DataError: As `Renderer.render` with the code of the first such row, and as `tokenise`.
        """

        def among(faults: Sized) -> str:
            return f"{len(faults)} of {self._rows} rows"

        if self._first_error is not None:
            what = among(self._unwritten) + self._unwritten.listed()
            raise DataError(self._first_error.code, what, fix=self._first_error.fix)
        if self._unended:
            fix = "set data.template to a format whose stop token the vocabulary has"
            raise DataError("HB207", among(self._unended) + self._unended.listed(), fix=fix)
        if self._doubled:
            fix = "take it out of the chat template or the rows: the tokenizer puts it before each text"
            raise DataError("HB220", among(self._doubled) + self._doubled.listed(), fix=fix)
        if not self._reading.skip(self._untaught):
            what = f"{among(self._untaught)} have no trained token among their first {self._max_length}"
            fix = "raise data.max_length, shorten these rows, or leave some out with data.skip_bad_rows"
            raise DataError("HB208", what + self._reading.named(self._untaught), fix=fix)


def _example(
    row: Rendered, tokens: TextTokens, prompt: NDArray[np.int32] | None, encoder: Encoder
) -> Example:
    prefix = encoder.missing_prefix(tokens.ids)
    input_ids = np.concatenate([prefix, tokens.ids])
    trained = np.concatenate([np.zeros(len(prefix), np.bool_), _trained(tokens, row.trained)])
    if prompt is not None:
        prompt = np.concatenate([encoder.missing_prefix(prompt), prompt])
    aligned = prompt is None or np.array_equal(input_ids[: len(prompt)], prompt)
    return Example(
        input_ids, trained, prompt, row.answer, row.id, row.where, truncated=False, aligned=aligned
    )


def _trained(tokens: TextTokens, spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens have their first character in one of the spans."""
    trained = np.zeros(len(tokens.ids), np.bool_)
    for begin, end in spans:
        trained |= (tokens.begins >= begin) & (tokens.begins < end)
    return trained


def _cut(example: Example, max_length: int) -> Example:
    if len(example.input_ids) <= max_length:
        return example
    return replace(
        example,
        input_ids=example.input_ids[:max_length],
        trained=example.trained[:max_length],
        truncated=True,
    )
