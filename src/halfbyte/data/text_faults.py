"""What is wrong with a tokenised text: a stop token that is not one token, a beginning that stands twice.

It owns these two judgements; it must not know how a text was tokenised, or what is done about a fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from halfbyte.data.render import Rendered
    from halfbyte.data.tokenizer import Encoder, TextTokens


def stop_fault(row: Rendered, tokens: TextTokens, encoder: Encoder) -> str:
    """Why an answer's stop token is not a single trained token, or an empty text."""
    for (begin, end), stop in zip(row.trained, row.stops, strict=True):
        whole = (tokens.ids == encoder.id_of(stop)) & (tokens.ends == end) & (tokens.begins >= begin)
        if not whole.any():
            return f"the tokenizer does not keep the stop token {stop!r} as one token"
    return ""


def bos_fault(row: Rendered, ids: NDArray[np.int32], encoder: Encoder) -> str:
    """Where a text begins again before it has ended, or an empty text.

    Formats that begin anew with each question (Llama 2) end the answer before it.
    """
    if encoder.bos is None:
        return ""
    ends = {encoder.eos, *(encoder.id_of(stop) for stop in row.stops)}
    begun: int | None = None
    for at in np.flatnonzero(np.isin(ids, [encoder.bos, *ends])).tolist():
        if ids[at] != encoder.bos:
            begun = None
        elif begun is not None:
            return f"the text begins at token {begun + 1} and again at token {at + 1}"
        else:
            begun = at
    return ""
