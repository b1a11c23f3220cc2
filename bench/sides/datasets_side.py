"""Hugging Face's datasets and transformers as a side of bench/prepare.py: rows of chats to tokens with a mask.

It owns that library's usual way; it must not import halfbyte. Usage: datasets_side.py OPTIONS_AS_JSON
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import datasets
from transformers import AutoTokenizer

MOST_TOKENS = 2048


def main(options: dict[str, str]) -> None:
    """Print one line of JSON: seconds from file to tokens, tokens, and how many of them are learnt."""
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(options["model"])
    template = options["template"]

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            batch["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            truncation=True,
            max_length=MOST_TOKENS,
        )
        return {"input_ids": found["input_ids"], "trained": found["assistant_masks"]}

    began = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=options["rows"], cache_dir=options["cache"], split="train"
    )
    rows = rows.map(encode, batched=True, remove_columns=rows.column_names)
    seconds = time.perf_counter() - began
    tokens = trained = 0
    for batch in rows.iter(1000):
        tokens += sum(map(len, batch["input_ids"]))
        trained += sum(map(sum, batch["trained"]))
    print(json.dumps({"seconds": seconds, "tokens": tokens, "trained": trained}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
