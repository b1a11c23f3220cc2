"""`halfbyte eval`: loss and exact matches of a model on rows, with intervals.

It owns the verb's options and table; it must not know how anything is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json
from halfbyte.cli.recipe import Json, Set, SkipBadRows

if TYPE_CHECKING:
    from halfbyte.evaluate.measure import Measurement

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte eval models/base held_out.jsonl\n\n"
    "halfbyte eval models/base held_out.jsonl --adapter runs/orders/adapter --quantization nf4\n\n"
    "halfbyte eval models/base held_out.jsonl --set evaluate.max_items=100 --json"
)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of the model.")],
    rows: Annotated[
        list[str], typer.Argument(metavar="ROWS...", help="Files or folders of rows to measure on.")
    ],
    *,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="LoRA adapter to put on top.")] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="Hold the model in 4 bits: nf4 or fp4.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder that gets one line per row.")] = Path(
        "eval"
    ),
    skip_bad_rows: SkipBadRows = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and exact matches of a model on rows, with 95 % intervals."""
    from halfbyte.config import load_config
    from halfbyte.pipeline import evaluate as evaluate_rows
    from halfbyte.report.watch import Watch

    base: dict[str, Any] = {
        "model": model,
        "method": "qlora" if quantization else "lora",
        "data": {"train": rows, "eval": rows, "skip_bad_rows": skip_bad_rows or 0},
    }
    if quantization:
        base["quantization"] = {"format": quantization}
    measured = evaluate_rows(load_config(None, settings or (), base), adapter, watch=Watch(STDERR))
    name = adapter.resolve().name if adapter else Path(model).resolve().name
    measured.write(output, name)
    if as_json:
        print_json({"output": str(output), **_as_json(measured)})
    else:
        _print(measured, output, name)


def _as_json(measured: Measurement) -> dict[str, Any]:
    return {m.name: m.interval.as_dict() for m in measured.metrics} | dict(measured.left_out)


def _print(measured: Measurement, output: Path, name: str) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in ("", "value", "95 % interval", "rows"):
        table.add_column(heading, justify="left" if not heading else "right")
    for metric in measured.metrics:
        shown, interval = metric.kind, metric.interval
        ends = f"{shown.text(interval.low)} to {shown.text(interval.high)}"
        table.add_row(shown.label, f"[bold]{shown.text(interval.value)}[/]", ends, f"{interval.n:,}")
    STDOUT.print(table)
    STDOUT.print(f"One line per row: {output}/{name}.*.jsonl", highlight=False, markup=False, soft_wrap=True)
