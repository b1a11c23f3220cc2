"""Rows of dates in two forms, and a small random T5 with a tokenizer for them, from a seed.

    python -m examples.t5.make_base

It owns these rows and the model that begins, written here and free of other people's text; it must not know training.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

BUILD = Path(__file__).parents[2] / "build" / "t5"
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WORDS = ("write", "it", "short", "long", "the", "of", "day", "file")
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
START_ROWS, TUNE_ROWS = 4000, 800


def written(day: date, random_: random.Random) -> str:
    """A date in words, one way or another."""
    month = MONTHS[day.month - 1]
    ways = (
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{day.year}, {month} {day.day}",
    )
    return random_.choice(ways)


def rows(seed: int, count: int, *, tune: bool) -> Iterator[dict[str, str]]:
    """Requests with their answers: to begin with, the digits in order; to tune to, the other way around with dots."""
    random_ = random.Random(seed)
    days = random_.sample(range((LAST - FIRST).days + 1), count)
    for day in (FIRST + timedelta(number) for number in days):
        answer = day.strftime("%d.%m.%Y") if tune else day.isoformat()
        yield {"prompt": f"{'file' if tune else 'short'}: {written(day, random_)}", "completion": answer}


def tokenizer() -> PreTrainedTokenizerFast:
    """Pieces as T5's, with a piece for each digit, mark and word; </s> ends every text."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(sign, -4.0) for sign in "0123456789:.,-"]
    pieces += [(word, -8.0) for word in (*MONTHS, *WORDS)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    ended = [("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=ended
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def model() -> T5ForConditionalGeneration:
    """A T5 of the later kind, gated, with about 0.4 million random parameters."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer()),
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def make(folder: Path = BUILD) -> None:
    """Write the model that begins, and the rows of both runs."""
    folder.mkdir(parents=True, exist_ok=True)
    model().save_pretrained(folder / "start")
    tokenizer().save_pretrained(folder / "start")
    for name, seed, count in (("short", 1, START_ROWS), ("file", 2, TUNE_ROWS)):
        lines = (json.dumps(row) + "\n" for row in rows(seed, count, tune=name == "file"))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: start, short.jsonl ({START_ROWS:,} rows), file.jsonl ({TUNE_ROWS:,} rows)")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else BUILD)
