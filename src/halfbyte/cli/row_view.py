"""A row on the terminal as the model sees it: what is learnt, which tokens steer the model, where it is cut.

It owns colours and brackets; it must not know how rows are rendered or tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data.images.batch import ImageExample
    from halfbyte.data.tokenise import Example

LEARNT = "bold green"
GIVEN = "dim"
CONTROL = "cyan"
IDS_PER_LINE = 8


@dataclass(frozen=True)
class Piece:
    """A token as it is shown.

    Attributes:
        text: What it adds to the text before it.
        id: Its id.
        trained: Whether it is learnt.
        control: Whether it is a special token.
    """

    text: str
    id: int
    trained: bool
    control: bool

    @property
    def style(self) -> str:
        """Colour: of what is learnt or given, with special tokens set off."""
        plain = LEARNT if self.trained else GIVEN
        return f"{plain} {CONTROL}" if self.control and not self.trained else plain


def print_example(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    ids: bool = False,
    title: str = "",
) -> None:
    """Print one row: a heading with its counts, its text with what is learnt marked, and where it is cut.

    Args:
        example: The row.
        tokenizer: Decodes it.
        console: Where to; without colour, what is learnt stands in ⟦brackets⟧.
        ids: Print each token with its id as well.
        title: What it is, where that is more than a row: the better answer, its label.
    """
    sides = [list(_pieces(ids, trained, tokenizer)) for ids, trained in example.sides]
    pieces = [piece for side in sides for piece in side]
    brackets = console.color_system is None
    cut = ", cut at max_length" if example.truncated else ""
    control = sum(piece.control for piece in pieces)
    trained = f", {example.trained_tokens:,} trained" if any(piece.trained for piece in pieces) else ""
    counts = f"{len(pieces):,} tokens, {control:,} of them special{trained}{cut}"
    console.print(Text(f"{example.where}   {counts}", style="bold"), soft_wrap=True)
    if title:
        console.print(Text(title), soft_wrap=True)
    for side in sides:
        ended = len(sides) > 1 and side[-1].id == tokenizer.eos_token_id
        console.print(_text(side, brackets=brackets, cut=example.truncated and not ended), soft_wrap=True)
        if ids:
            for start in range(0, len(side), IDS_PER_LINE):
                console.print(_ids(side[start : start + IDS_PER_LINE], brackets=brackets), soft_wrap=True)
    console.print()


def print_image(example: ImageExample, size: str, console: Console, *, title: str) -> None:
    """Print one image: where it is, what the model is shown of it, and its label."""
    console.print(Text(f"{example.where}   {size}, {example.tokens:,} tokens", style="bold"), soft_wrap=True)
    console.print(Text(title), soft_wrap=True)
    console.print()


def _text(pieces: list[Piece], *, brackets: bool, cut: bool) -> Text:
    shown = Text()
    for trained, group in groupby(pieces, key=lambda piece: piece.trained):
        marked = trained and brackets
        shown.append("⟦" if marked else "")
        for piece in group:
            shown.append(piece.text, style=piece.style)
        shown.append("⟧" if marked else "")
    return shown.append("✂" if cut else "", style="bold red")


def _ids(pieces: list[Piece], *, brackets: bool) -> Text:
    cells = []
    for piece in pieces:
        cell = f"{piece.id}:{piece.text!r}"
        cells.append(Text(f"⟦{cell}⟧" if brackets and piece.trained else cell, style=piece.style))
    return Text("  ").join(cells)


def _pieces(
    ids_of: NDArray[np.int32], learnt: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    """A row's tokens with what each adds to the text.

    Decoded alone, a token could lose a blank: it is decoded behind the ones before it. Half a character shows with
    the token that completes it.
    """
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    ids = ids_of.tolist()
    begin = shown = 0
    for at, (token, trained) in enumerate(zip(ids, learnt.tolist(), strict=True), start=1):
        text = decoded(ids[begin:at])
        if text.endswith("\ufffd") and at < len(ids):
            yield Piece("", token, trained, token in special)
            continue
        yield Piece(text[len(decoded(ids[begin:shown])) :], token, trained, token in special)
        begin, shown = shown, at
