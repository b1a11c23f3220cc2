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
    from halfbyte.data.images.read import ImageReport
    from halfbyte.data.order import Usage
    from halfbyte.data.row import Row
    from halfbyte.data.tokenise import Example
    from halfbyte.settings import Config

CHECK_EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte data check rows.jsonl\n\n"
    "halfbyte data check a.parquet b.csv folder --json\n\n"
    "halfbyte data check rows.jsonl --model models/base --set data.max_length=1024\n\n"
    "halfbyte data check pairs.jsonl --task dpo --model models/base"
)
SHOW_EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte data show rows.jsonl --model models/base\n\n"
    "halfbyte data show rows.jsonl --model models/base -n 10 --max-length 1024\n\n"
    "halfbyte data show rows.jsonl --model models/base --row 7 --tokens --template llama3\n\n"
    "halfbyte data show labelled.csv --model models/encoder --task classify"
)

app = typer.Typer(help="Check rows, and look at them.", no_args_is_help=True, rich_markup_mode="rich")

Files = Annotated[list[str], typer.Argument(metavar="FILES...", help="Files or folders of rows.")]
Format = Annotated[
    str,
    typer.Option("--format", help="Columns of the rows; auto looks at each file.", metavar="NAME"),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="What the rows are for: sft, dpo, kto, classify, tag, …"),
]


@app.command("check", epilog=CHECK_EXAMPLES)
def check(
    files: Files,
    *,
    model: Annotated[
        str | None, typer.Option("--model", help="Model folder: counts tokens, and how full passes are.")
    ] = None,
    task: TaskOption = None,
    skip_bad_rows: SkipBadRows = None,
    settings: Set = None,
    format: Format = "auto",  # noqa: A002
    as_json: Json = False,
) -> None:
    """Read every row, name every bad line, and count what is there."""
    config = _settings(files, format, [*(settings or ()), *_given(task, skip_bad_rows)], model)
    found = _counted(config) if model is None else _tokenised(config)
    if as_json:
        read = {
            "objective": found.objective,
            "formats": found.reading.formats,
            "skipped": list(map(asdict, found.reading.skipped)),
        }
        tokens = {"tokens": asdict(found.tokens)} if found.tokens else {}
        print_json(read | asdict(found.report) | tokens)
    else:
        _print_report(found)


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
    task: TaskOption = None,
    skip_bad_rows: SkipBadRows = None,
    format: Format = "auto",  # noqa: A002
) -> None:
    """Show rows as the model sees them; trained tokens in colour, or in ⟦brackets⟧ without colour."""
    wanted = [f"data.template={json.dumps(template)}", f"data.max_length={max_length}"]
    config = _settings(files, format, [*wanted, *_given(task, skip_bad_rows)], model)
    if config.task == "sft":
        _show_words(config, count, row, tokens)
    else:
        _show_units(config, count, row, tokens)


def _show_words(config: Config, count: int, row: int | None, tokens: bool) -> None:
    """Rows to write, of which no more are tokenised than are shown."""
    from halfbyte.cli.row_view import print_example
    from halfbyte.data.check import check_rows
    from halfbyte.data.faults import Reading
    from halfbyte.data.read import read_rows

    data = config.data
    reading = Reading(data.skip_bad_rows)
    rows = check_rows(read_rows(data.train, data.format, reading), reading=reading).rows
    examples, template, tokenizer = _encoded(rows[_chosen(count, row, len(rows))], config, reading)
    skipped = f", {len(reading.skipped):,} bad rows skipped" if reading.skipped else ""
    STDOUT.print(f"template {template}, {len(rows):,} rows{skipped}\n", highlight=False)
    for example in examples:
        print_example(example, tokenizer, STDOUT, ids=tokens)


def _encoded(
    rows: Sequence[Row], config: Config, reading: Reading
) -> tuple[Sequence[Example], str, PreTrainedTokenizerBase]:
    """Rows as the model of the settings takes them, how they were written out, and with what."""
    from halfbyte.data.render import Renderer
    from halfbyte.data.seq2seq import PromptWriter, encode_pairs
    from halfbyte.data.tokenise import tokenise_rows
    from halfbyte.data.tokenizer import load_tokenizer
    from halfbyte.model.seq2seq import decoder_start, holds_encoder_decoder

    data, tokenizer = config.data, load_tokenizer(config.model)
    if holds_encoder_decoder(folder := Path(config.model)):
        writer = PromptWriter(tokenizer, data.template)
        pairs = encode_pairs(rows, writer, decoder_start(folder), data.max_length, 1.0)
        return pairs.examples, writer.template, tokenizer
    renderer = Renderer(tokenizer, data.template)
    found = tokenise_rows(rows, renderer, data.max_length, reading=reading)
    return found.examples, renderer.template, tokenizer


def _show_units(config: Config, count: int, row: int | None, tokens: bool) -> None:
    """Rows of any other task, each with all that is judged together."""
    from halfbyte.cli.row_view import print_example, print_image
    from halfbyte.data.tokenise import Example
    from halfbyte.data.tokenizer import load_tokenizer
    from halfbyte.tasks.known import prepare

    task = prepare(config, held_out_only=True)
    examples, each = task.rows.held_out, task.members
    tokenizer = None if config.task == "classify_images" else load_tokenizer(config.model)
    STDOUT.print(f"{task.described()}\n", highlight=False, markup=False, soft_wrap=True)
    for unit in range(task.count(examples))[_chosen(count, row, task.count(examples))]:
        members = [examples[each * unit + k] for k in range(each)]
        for example, title in zip(members, task.titles(members[0]), strict=True):
            if isinstance(example, Example):
                assert tokenizer is not None, "texts have tokens"
                print_example(example, tokenizer, STDOUT, ids=tokens, title=title)
            else:
                print_image(example, task.rows.template, STDOUT, title=title)


def _chosen(count: int, row: int | None, rows: int) -> slice:
    """Which rows are shown.

    Raises:
        ConfigError: HB102 for a row that is not there.
    """
    if row is None:
        return slice(count)
    if row > rows:
        what = f"got {row}, expected at most {rows}, the number of rows"
        raise ConfigError("HB102", what, where="--row")
    return slice(row - 1, row)


def _given(task: str | None, skip_bad_rows: int | None) -> list[str]:
    options = {"task": task, "data.skip_bad_rows": skip_bad_rows}
    return [f"{name}={value}" for name, value in options.items() if value is not None]


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


@dataclass(frozen=True)
class Found:
    """What rows came to.

    Attributes:
        objective: What can be learnt from them, or what they were read for.
        report: What was counted.
        reading: Formats of the files, and rows that were skipped.
        tokens: Counted with a model's tokenizer; None without one.
    """

    objective: str
    report: DataReport | ImageReport
    reading: Reading
    tokens: Tokens | None = None


def _counted(config: Config) -> Found:
    """Rows by their words alone: for the task that is set, or else for what the first one is good for."""
    from halfbyte.data.check import check_rows
    from halfbyte.data.faults import Reading
    from halfbyte.data.images.read import ImageReport, read_images
    from halfbyte.data.read import read_rows
    from halfbyte.data.row import OBJECTIVES

    data = config.data
    reading = Reading(data.skip_bad_rows)
    if config.task == "classify_images":
        return Found(config.task, ImageReport.of(read_images(data.train, reading)), reading)
    rows = read_rows(data.train, data.format, reading)
    objective = rows[0].objective if rows and config.task == "sft" else OBJECTIVES[config.task]
    return Found(objective, check_rows(rows, objective, reading).report, reading)


def _tokenised(config: Config) -> Found:
    """Rows as their task gives them to the model, and passes filled with them as training would."""
    from halfbyte.data.check import Lengths
    from halfbyte.data.order import Usage, order_of
    from halfbyte.data.row import OBJECTIVES
    from halfbyte.tasks.known import prepare
    from halfbyte.train.plan import unit_lengths

    alone = config.data.model_copy(update={"cache": False})
    task = prepare(config.model_copy(update={"data": alone}), held_out_only=True)
    examples = task.rows.held_out
    usage = Usage.of(order_of(unit_lengths(examples, task.members), task.config.train, config.seed))
    tokens = Tokens(Lengths.of(examples.lengths), task.rows.cut[1], usage)
    return Found(OBJECTIVES.get(config.task, config.task), task.rows.report, task.rows.reading, tokens)


def _described(reading: Reading) -> dict[str, str]:
    """What each file was read as, and which rows were skipped; a line for each."""
    from halfbyte.errors import listed

    files = [f"{file}: {name}" for file, name in reading.formats.items()]
    faults = list(map(str, reading.skipped))
    skipped = (f"{len(faults):,}" + listed(faults)).split("\n") if faults else []
    return {name: "\n".join(lines) for name, lines in (("format", files), ("skipped", skipped)) if lines}


def _print_report(found: Found) -> None:
    from rich.text import Text

    from halfbyte.data.check import DataReport

    report, tokens = found.report, found.tokens
    lines = {"objective": found.objective, **_described(found.reading)}
    lines |= {"rows": f"{report.rows:,}", "duplicates": f"{report.duplicates:,}"}
    if isinstance(report, DataReport):
        lines |= {
            "empty prompts": f"{report.empty_prompts:,}",
            "styles": ", ".join(f"{style} {n:,}" for style, n in report.styles.items()),
            "turns": ", ".join(f"{role} {n:,}" for role, n in report.roles.items()) or "none",
        }
    if report.labels:
        total = sum(report.labels.values())
        shares = [f"{label} {n:,} ({n / total:.0%})" for label, n in report.labels.items()]
        lines["labels"] = ", ".join(shares)
    if isinstance(report, DataReport):
        lines["characters"] = _spread(report.characters)
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
