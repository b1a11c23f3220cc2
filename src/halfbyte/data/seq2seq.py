"""Prompts and answers as a model with an encoder and a decoder takes them: the one is read, the other written.

It owns how a row becomes these two texts, their tokens and their arrays; it must not know models or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoder_texts import refuse_no_room
from halfbyte.data.examples import Listed
from halfbyte.data.faults import Faults
from halfbyte.data.fingerprint import NO_FORMAT, Fingerprint
from halfbyte.data.pack import Batch, collate
from halfbyte.data.render import Renderer
from halfbyte.data.row import Row
from halfbyte.data.tokenise import ROWS_AT_ONCE, Example
from halfbyte.data.tokenizer import Encoder
from halfbyte.data.truncation import refuse_too_many_cut
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.settings import TemplateName


@dataclass(frozen=True)
class Seq2SeqExample(Example):
    """A prompt to read and an answer to write.

    `input_ids` are the decoder's: the token it starts from, the answer, the end; all but the first are trained.
    `prompt_ids` are the encoder's, cut at the longest length allowed.
    """

    @property
    def source(self) -> NDArray[np.int32]:
        """What the encoder reads, int32, (S,)."""
        assert self.prompt_ids is not None, "there is no other kind of row"
        return self.prompt_ids

    @property
    def tokens(self) -> int:
        """Tokens of both sides."""
        return len(self.source) + len(self.input_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(len(self.source), len(self.input_ids))

    @property
    def sides(self) -> tuple[tuple[NDArray[np.int32], NDArray[np.bool_]], ...]:
        """What is read, and what is written."""
        read = self.source, np.zeros(len(self.source), np.bool_)
        return read, (self.input_ids[1:], self.trained[1:])

    @property
    def content(self) -> bytes:
        """The tokens of both sides, and which are targets."""
        return len(self.source).to_bytes(8, "little") + self.source.tobytes() + super().content


@dataclass(frozen=True)
class Seq2SeqBatch(Batch):
    """Answers as a `Batch` side by side, and the prompts they belong to.

    Attributes:
        source_ids: Token ids of the prompts, int64, (B, S).
        source_lengths: Tokens of each prompt, int64, (B,); what is behind them is padding.
    """

    source_ids: NDArray[np.int64]
    source_lengths: NDArray[np.int64]

    @property
    def is_packed(self) -> bool:
        """Never: an encoder would have to keep prompts apart, and the decoder answers from other prompts."""
        return False

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers, without padding."""
        return int(self.lengths.sum() + self.source_lengths.sum())

    @property
    def source_mask(self) -> NDArray[np.int64]:
        """1 for a prompt's tokens, 0 for padding, int64, (B, S)."""
        places = np.arange(self.source_ids.shape[1])
        return (places[None] < self.source_lengths[:, None]).astype(np.int64)


def collate_seq2seq(examples: Sequence[Example], pad_id: int) -> Seq2SeqBatch:
    """Lay prompts and answers side by side, each filled up at the right to the longest of its kind.

    Args:
        examples: At least one `Seq2SeqExample`, in the order they are to have.
        pad_id: Id to fill with; it is masked and never a target, whatever else it means to the model.
    """
    sources = [example.source for example in examples if isinstance(example, Seq2SeqExample)]
    lengths = np.array(list(map(len, sources)), np.int64)
    source_ids = np.full((len(sources), int(lengths.max())), pad_id, np.int64)
    for row, source in enumerate(sources):
        source_ids[row, : len(source)] = source
    answers = collate(examples, pad_id)
    laid = {part.name: getattr(answers, part.name) for part in fields(Batch)}
    return Seq2SeqBatch(**laid, source_ids=source_ids, source_lengths=lengths)


class PromptWriter:
    """Writes rows out as the two texts.

    Args:
        tokenizer: The model's.
        template: As `data.template`: `auto` is the tokenizer's own chat template or, without one, none: the words of
            the prompt and nothing else. Any other writes the prompt, up to where the answer begins.

    Attributes:
        tokenizer: As given.
        template: The chat format in use, `none` without one.
        eos: Id of the token that ends answers.

    Raises:
        DataError: As `Renderer`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateName = "auto") -> None:
        self.tokenizer = tokenizer
        self._bare = template == "auto" and not tokenizer.chat_template
        self._renderer = Renderer(tokenizer, "plain" if self._bare else template)
        self.template = NO_FORMAT if self._bare else self._renderer.template
        self._end = str(tokenizer.eos_token)
        self.eos = Encoder(tokenizer).id_of(self._end)

    @property
    def fingerprint(self) -> Fingerprint:
        """Digests of what is put around prompts, and of the tokenizer."""
        return Fingerprint.of_texts(self.tokenizer) if self._bare else Fingerprint.of(self._renderer)

    def write(self, row: Row) -> tuple[str, str]:
        """A row's prompt, and its answer without the end.

        Raises:
            DataError: HB245 for a row that is no prompt with an answer, HB210 if a message holds a token that steers
                the model; as `Renderer.prompt` for a chat format that cannot write it.
        """
        if row.messages is None:
            raise _unusable(row, "it is a text, without a prompt and an answer", "give both columns")
        asked, answer = row.messages[:-1], row.messages[-1]
        if row.tools or any(message.tool_facts for message in row.messages):
            raise _unusable(row, "it has tools", "tune a causal model with rows of tools")
        if row.style == "completion":
            return "".join(m.content for m in asked), answer.content.removesuffix(self._end)
        try:
            self._renderer.refuse_control_tokens(row)
            if not self._bare:
                return self._renderer.prompt(asked), answer.content
        except DataError as error:
            raise DataError(error.code, error.what, where=row.where, fix=error.fix) from error
        if any(message.role == "assistant" for message in asked):
            what = "it is a conversation of several answers, and no chat format tells who speaks"
            raise _unusable(
                row, what, "set data.template to plain, or give rows of one prompt and one answer"
            )
        return "\n\n".join(m.content for m in asked if m.content), answer.content


def _unusable(row: Row, what: str, fix: str) -> DataError:
    return DataError("HB245", what, where=row.where, fix=fix)


@dataclass
class Pairs:
    """Rows as prompts and answers in tokens.

    Attributes:
        examples: In the order of the rows.
        unread: Rows whose prompt has characters that the tokenizer has no token for.
        altered: Rows whose answer the tokenizer does not give back as it was: blanks or line ends become others.
    """

    examples: list[Seq2SeqExample] = field(default_factory=list)
    unread: int = 0
    altered: int = 0

    @property
    def listed(self) -> Listed[Seq2SeqExample]:
        """The examples as a training loop takes them."""
        return Listed(self.examples)

    @property
    def cut(self) -> int:
        """Rows of which a side was cut."""
        return sum(example.truncated for example in self.examples)


def encode_pairs(
    rows: Sequence[Row], writer: PromptWriter, start: int, max_length: int, max_truncated: float = 1.0
) -> Pairs:
    """Tokenise rows: prompts as the tokenizer does with its own special tokens, answers with the end behind them.

    Args:
        rows: Checked rows.
        writer: Writes them out, and holds the tokenizer.
        start: Token id that the decoder is given first.
        max_length: Tokens to keep of each side. A longer prompt keeps its end token, a longer answer loses it: it is
            not to be taken for a whole one.
        max_truncated: Share of the rows that may be cut, 0 to 1.

    Raises:
        DataError: As `PromptWriter.write` with the code of the first such row, HB230 if `max_length` holds no prompt,
            HB246 for answers without a token, HB247 for answers with unknown ones, HB221 if too many rows are cut;
            each names every such row.
    """
    refuse_no_room(writer.tokenizer, max_length, rows)
    encoder = _PairEncoder(writer, start, max_length)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        encoder.take(rows[begin : begin + ROWS_AT_ONCE])
    encoder.refuse(len(rows))
    found = encoder.found
    wholes, places = np.array(encoder.wholes, np.int64), found.examples
    refuse_too_many_cut(wholes, max_length, max_truncated, lambda at: places[at].where)
    return found


class _PairEncoder:
    """Encodes rows part by part and notes those that cannot be learnt from until all were seen."""

    def __init__(self, writer: PromptWriter, start: int, max_length: int) -> None:
        self.found, self.wholes = Pairs(), list[int]()
        self._writer, self._start, self._max_length = writer, start, max_length
        self._before = Encoder(writer.tokenizer).prefix
        self._first: DataError | None = None
        self._unwritten: Faults[str] = Faults()
        self._empty: Faults[str] = Faults()
        self._unknown: Faults[str] = Faults()

    def take(self, rows: Sequence[Row]) -> None:
        """Encode some rows."""
        written: list[tuple[Row, str, str]] = []
        for row in rows:
            try:
                written.append((row, *self._writer.write(row)))
            except DataError as error:
                self._first = self._first or error
                self._unwritten.add(f"{error.where}: {error.what}")
        if not written:
            return
        sources = self._sources([prompt for _, prompt, _ in written])
        tokenizer = self._writer.tokenizer
        answers = tokenizer([a for *_, a in written], add_special_tokens=False, verbose=False)["input_ids"]
        for (row, _, answer), (source, whole), ids in zip(written, sources, answers, strict=True):
            self._add(row, answer, source, whole, ids)

    def _sources(self, prompts: Sequence[str]) -> list[tuple[list[int], int]]:
        """Ids of each prompt, cut where it is too long, and how many there were."""
        tokenizer = self._writer.tokenizer
        found = [(ids, len(ids)) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
        long = [at for at, (_, whole) in enumerate(found) if whole > self._max_length]
        if long:
            texts = [prompts[at] for at in long]
            cut = tokenizer(texts, truncation=True, max_length=self._max_length)["input_ids"]
            for at, ids in zip(long, cut, strict=True):
                found[at] = ids, found[at][1]
        return found

    def _add(self, row: Row, answer: str, source: list[int], whole_source: int, ids: list[int]) -> None:
        writer, unknown = self._writer, self._writer.tokenizer.unk_token_id
        if not ids:
            self._empty.add(f"{row.where}: {answer[:40]!r}")
        elif unknown is not None and unknown in ids:
            self._unknown.add(f"{row.where}: {ids.count(unknown)} of {len(ids)} tokens")
        given_back = writer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(given_back, str)
        self.found.altered += given_back.strip() != answer.strip()
        self.found.unread += unknown is not None and unknown in source
        target = [*self._before.tolist(), *ids, writer.eos]
        kept = np.array([self._start, *target[: self._max_length]], np.int32)
        whole = max(whole_source, len(target))
        self.wholes.append(whole)
        self.found.examples.append(
            Seq2SeqExample(
                kept,
                np.arange(len(kept)) > 0,
                np.array(source, np.int32),
                answer,
                row.id,
                row.where,
                truncated=whole > self._max_length,
            )
        )

    def refuse(self, rows: int) -> None:
        """Refuse all rows that cannot be learnt from, those of the first kind there are."""
        if self._first is not None:
            what = f"{len(self._unwritten)} of {rows} rows{self._unwritten.listed()}"
            raise DataError(self._first.code, what, fix=self._first.fix)
        if self._empty:
            what = f"{len(self._empty)} of {rows} answers{self._empty.listed()}"
            raise DataError("HB246", what, fix="mend or remove these rows")
        if self._unknown:
            what = f"{len(self._unknown)} of {rows} answers{self._unknown.listed()}"
            fix = "write these answers with characters of the vocabulary, or use a model that has the missing ones"
            raise DataError("HB247", what, fix=fix)
