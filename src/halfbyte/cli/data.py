"""`halfbyte data`: check rows, and look at them as the model sees them.

It owns the verbs' options and how counts look on a terminal; it must not know how rows are read or tokenised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli.consoles import STDOUT, print_json
from halfbyte.cli.recipe import Json, Set, SkipBadRows
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from halfbyte.data.check import DataReport, Lengths
    from halfbyte.data.faults import Reading
    from halfbyte.data.order import Usage
    from halfbyte.data.row import Row
    from halfbyte.data.tokenise import Example
    from halfbyte.settings import Config, TrainConfig

CHECK_EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte data check rows.jsonl\n\n"
    "halfbyte data check a.parquet b.csv folder --json\n\n"
    "halfbyte data check rows.jsonl --model models/base --set data.max_length=1024"
)
SHOW_EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte data show rows.jsonl --model models/base\n\n"
    "halfbyte data show rows.jsonl --model models/base -n 10 --max-length 1024\n\n"
    "halfbyte data show rows.jsonl --model models/base --row 7 --tokens --template llama3"
)

app = typer.Typer(help="Check rows, and look at them.", no_args_is_help=True, rich_markup_mode="rich")

Files = Annotated[list[str], typer.Argument(metavar="FILES...", help="Files or folders of rows.")]
Format = Annotated[
    str,
    typer.Option("--format", help="Columns of the rows; auto looks at each file.", metavar="NAME"),
]


@app.command("check", epilog=CHECK_EXAMPLES)
def check(
    files: Files,
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="Model folder: counts tokens, and how full passes are.")
    ] = None,
    skip_bad_rows: SkipBadRows = None,
    settings: Set = None,
    format: Format = "auto",  # noqa: A002
    as_json: Json = False,
) -> None:
    """Read every row, name every bad line, and count what is there."""
    from halfbyte.data.check import check_rows
    from halfbyte.data.faults import Reading
    from halfbyte.data.read import read_rows

    config = _settings(files, format, [*(settings or ()), *_skip(skip_bad_rows)], model)
    reading = Reading(config.data.skip_bad_rows)
    rows = read_rows(config.data.train, config.data.format, reading)
    objective = rows[0].objective if rows and model is None else "sft"
    checked = check_rows(rows, objective, reading)
    tokens = _count_tokens(checked.rows, config, reading) if model is not None else None
    if as_json:
        read = {
            "objective": objective,
            "formats": reading.formats,
            "skipped": list(map(asdict, reading.skipped)),
        }
        print_json(read | asdict(checked.report) | ({"tokens": asdict(tokens)} if tokens else {}))
    else:
        _print_report(checked.report, tokens, {"objective": objective} | _described(reading))


@app.command("show", epilog=SHOW_EXAMPLES)
def show(
    files: Files,
    *,
    model: Annotated[str, typer.Option("--model", help="Folder of the model whose tokenizer is used.")],
    count: Annotated[int, typer.Option("-n", min=1, help="Rows to show.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Show this row alone, from 1.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token with its id.")] = False,
    template: Annotated[str, typer.Option("--template", help="As data.template: auto, llama3, …")] = "auto",
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens to keep of each row.")] = 512,
    skip_bad_rows: SkipBadRows = None,
    format: Format = "auto",  # noqa: A002
) -> None:
    """Show rows as the model sees them; trained tokens in colour, or in ⟦brackets⟧ without colour."""
    from halfbyte.cli.row_view import print_example
    from halfbyte.data.check import check_rows
    from halfbyte.data.faults import Reading
    from halfbyte.data.read import read_rows

    wanted = [f"data.template={json.dumps(template)}", f"data.max_length={max_length}", *_skip(skip_bad_rows)]
    config = _settings(files, format, wanted, model)
    settings = config.data
    reading = Reading(settings.skip_bad_rows)
    rows = check_rows(read_rows(settings.train, settings.format, reading), reading=reading).rows
    if row is not None and row > len(rows):
        raise ConfigError(
            "HB102", f"got {row}, expected at most {len(rows)}, the number of rows", where="--row"
        )
    shown = rows[:count] if row is None else rows[row - 1 : row]
    tokenised = _tokenised(shown, config, 1.0, reading)
    skipped = f", {len(reading.skipped):,} bad rows skipped" if reading.skipped else ""
    STDOUT.print(f"template {tokenised.template}, {len(rows):,} rows{skipped}\n", highlight=False)
    for example in tokenised.examples:
        print_example(example, tokenised.tokenizer, STDOUT, ids=tokens)


def _skip(rows: int | None) -> list[str]:
    return [] if rows is None else [f"data.skip_bad_rows={rows}"]


def _settings(
    files: Sequence[str], layout: str, overrides: Sequence[str] | None, model: str | None = None
) -> Config:
    """The options as settings, so that a bad one is named as it would be in a recipe."""
    from halfbyte.config import load_config

    base = {"model": model or "-", "data": {"train": list(files), "format": layout}}
    return load_config(None, list(overrides or ()), base)


@dataclass(frozen=True)
class Tokens:
    """Rows counted in tokens.

    Attributes:
        lengths: Tokens per row.
        cut: Rows cut at `data.max_length`.
        passes: How full the passes of an epoch are.
    """

    lengths: Lengths
    cut: int
    passes: Usage


def _count_tokens(rows: Sequence[Row], config: Config, reading: Reading) -> Tokens:
    """Tokenise rows and fill passes with them, as training would."""
    from halfbyte.data.check import Lengths
    from halfbyte.data.order import Usage, order_of

    tokenised = _tokenised(rows, config, config.data.max_truncated, reading)
    lengths = [example.tokens for example in tokenised.examples]
    usage = Usage.of(order_of(lengths, tokenised.train, config.seed))
    return Tokens(Lengths.of(lengths), sum(e.truncated for e in tokenised.examples), usage)


@dataclass(frozen=True)
class _Tokenised:
    """Rows as a model takes them, how they were written out, and settings that batches of them follow."""

    examples: Sequence[Example]
    template: str
    tokenizer: PreTrainedTokenizerBase
    train: TrainConfig


def _tokenised(
    rows: Sequence[Row], config: Config, max_truncated: float, reading: Reading
) -> _Tokenised:
    """Tokenise rows as the model of the settings takes them."""
    from halfbyte.data.render import Renderer
    from halfbyte.data.seq2seq import PromptWriter, encode_pairs
    from halfbyte.data.tokenise import load_tokenizer, tokenise_rows
    from halfbyte.model.seq2seq import decoder_start, holds_encoder_decoder

    data, tokenizer = config.data, load_tokenizer(config.model)
    if holds_encoder_decoder(folder := Path(config.model)):
        writer = PromptWriter(tokenizer, data.template)
        pairs = encode_pairs(rows, writer, decoder_start(folder), data.max_length, max_truncated)
        return _Tokenised(pairs.examples, writer.template, tokenizer, config.train.padded)
    renderer = Renderer(tokenizer, data.template)
    found = tokenise_rows(rows, renderer, data.max_length, max_truncated, reading=reading)
    return _Tokenised(found.examples, renderer.template, tokenizer, config.train)


def _described(reading: Reading) -> dict[str, str]:
    """What each file was read as, and which rows were skipped; a line for each."""
    from halfbyte.errors import listed

    files = [f"{file}: {name}" for file, name in reading.formats.items()]
    faults = list(map(str, reading.skipped))
    skipped = (f"{len(faults):,}" + listed(faults)).split("\n") if faults else []
    return {name: "\n".join(lines) for name, lines in (("format", files), ("skipped", skipped)) if lines}


def _print_report(report: DataReport, tokens: Tokens | None, read: dict[str, str]) -> None:
    from rich.text import Text

    lines = {
        **read,
        "rows": f"{report.rows:,}",
        "duplicates": f"{report.duplicates:,}",
        "empty prompts": f"{report.empty_prompts:,}",
        "styles": ", ".join(f"{style} {n:,}" for style, n in report.styles.items()),
        "turns": ", ".join(f"{role} {n:,}" for role, n in report.roles.items()) or "none",
        **(
            {"labels": ", ".join(f"{label} {n:,}" for label, n in report.labels.items())}
            if report.labels
            else {}
        ),
        "characters": _spread(report.characters),
    }
    if tokens is not None:
        cut = f"; {tokens.cut:,} rows cut at max_length" if tokens.cut else ""
        lines |= {"tokens": _spread(tokens.lengths) + cut, "passes": tokens.passes.described()}
    for name, text in lines.items():
        first, *rest = text.split("\n")
        STDOUT.print(Text.assemble((f"{name:<14}", "bold"), f" {first}"), soft_wrap=True)
        for line in rest:
            STDOUT.print(Text(f"{'':<14} {line}"), soft_wrap=True)


def _spread(lengths: Lengths) -> str:
    return (
        f"{lengths.shortest:,} to {lengths.longest:,}, "
        f"half of the rows up to {lengths.median:,}, 95 % up to {lengths.p95:,}"
    )
