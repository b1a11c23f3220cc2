"""Make the tiny base from nothing: tokenizer, start, corpus, then two halfbyte runs with `method: full`.

It owns the order of these steps and their sizes; it must not know how anything is trained.

    python -m examples.tiny_base.pretrain [--work build/tiny_base]

From the repository's root; about 14 minutes on 2 cores. The same seed gives the same tokenizer, start and corpus.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from examples.tiny_base.corpus import END, documents
from examples.tiny_base.induction import EMBEDDING_STD, write_induction_heads
from examples.tiny_base.words import invented_word
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halfbyte.config import load_config
from halfbyte.pipeline import run

FOLDER = Path(__file__).parent
SEED = 0
VOCABULARY = 1280
SPECIAL = (END, "<|im_start|>", "<|im_end|>", "<|pad|>")
DRILL_ROWS, DRILL_TOKENS = 20_000, 48
TEXT_ROWS, TEXT_TOKENS = 44_000, 256
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, trained on the corpus."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    bpe.decoder = decoders.ByteLevel()
    texts = documents(SEED + 99)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((next(texts) for _ in range(20_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token="<|pad|>", chat_template=CHATML, model_max_length=512
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, 2.0 M parameters."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=EMBEDDING_STD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    write_induction_heads(model)
    return model


def drills(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Rows of a few words or pieces of words again and again: nothing but copying makes them likely."""
    rng = random.Random(SEED + 3)
    pieces = sorted(tokenizer.get_vocab())
    words = [
        piece[1:] for piece in pieces if piece.startswith("Ġ") and piece[1:].isalpha() and len(piece) > 2
    ]
    parts = [piece for piece in pieces if piece.isascii() and piece.isalpha()]

    def word() -> str:
        chance = rng.random()
        if chance < 0.4:
            return rng.choice(words)
        if chance < 0.8:
            return "".join(rng.choice(parts) for _ in range(rng.randint(1, 3)))
        return invented_word(rng).capitalize() if chance < 0.9 else str(rng.randint(0, 999))

    for _ in range(DRILL_ROWS):
        said = [word() for _ in range(rng.randint(2, 8))]
        between = rng.choice((" ", " ", " ", ", "))
        once = between.join(said) + between
        yield once * (1 + DRILL_TOKENS // len(said))


def texts(tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Rows of whole documents, as many as fit into a row's tokens, with the end of text between them."""
    source = documents(SEED + 1)
    row, length, rows = "", 0, 0
    while rows < TEXT_ROWS:
        batch = [next(source) for _ in range(500)]
        for document, ids in zip(batch, tokenizer(batch).input_ids, strict=True):
            if row and length + len(ids) + 1 > TEXT_TOKENS:
                yield row
                row, length, rows = "", 0, rows + 1
                if rows == TEXT_ROWS:
                    return
            row, length = (row + END if row else "") + document, length + len(ids) + 1


def write_rows(file: Path, rows: Iterator[str]) -> None:
    """Write `{"text": …}` rows."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in rows)


def main() -> None:
    """Make everything in a work folder, then put the result into `model/` beside this file."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base.")
    parser.add_argument(
        "--work", type=Path, default=Path("build/tiny_base"), help="folder for all that is made"
    )
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    for save in (tokenizer.save_pretrained, new_model(tokenizer).save_pretrained):
        save(work / "start")
    write_rows(work / "drills.jsonl", drills(tokenizer))
    write_rows(work / "text.jsonl", texts(tokenizer))
    result = work / "start"
    for stage in ("drills", "text"):
        place = [f"model={result}", f"data.train={work / stage}.jsonl", f"output_dir={work / stage}"]
        result = run(load_config(FOLDER / f"{stage}.yaml", place), overwrite=True).result
    model = LlamaForCausalLM.from_pretrained(result, dtype=torch.bfloat16)
    model.save_pretrained(FOLDER / "model")
    tokenizer.save_pretrained(FOLDER / "model")


if __name__ == "__main__":
    main()
