"""`halfbyte config`: what can be set.

It owns how settings are listed; it must not know what any of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from halfbyte.cli.consoles import STDOUT, print_json
from halfbyte.cli.recipe import Json

if TYPE_CHECKING:
    from pydantic import BaseModel

EXAMPLES = "[bold]Examples[/]\n\nhalfbyte config schema\n\nhalfbyte config schema --json > recipe.schema.json"

app = typer.Typer(help="List every setting.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def verbs() -> None:
    """List every setting."""


@app.command("schema", epilog=EXAMPLES)
def schema(as_json: Json = False) -> None:
    """Print every setting with its default and meaning; with --json, as a JSON Schema for editors."""
    from rich.table import Table

    from halfbyte.settings import Config

    if as_json:
        print_json(Config.model_json_schema())
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("setting", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    for row in _settings(Config):
        table.add_row(*row)
    STDOUT.print(table, highlight=False, markup=False)


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each setting, sections after the plain ones of their level."""
    from pydantic import BaseModel

    nested = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            nested[name] = field.annotation
            continue
        plain = "null" if field.default is None else str(field.default)
        yield (
            f"{prefix}{name}",
            "(required)" if field.is_required() else plain,
            " ".join((field.description or "").split()),
        )
    for name, model in nested.items():
        yield from _settings(model, f"{prefix}{name}.")
