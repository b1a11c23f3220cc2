"""`halfbyte config`: what can be set, and other tools' settings as ours.

It owns how settings are listed and where an imported recipe is written; it must not know what any of them does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json
from halfbyte.cli.recipe import Json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from halfbyte.foreign.importing import Imported

EXAMPLES = "[bold]Examples[/]\n\nhalfbyte config schema\n\nhalfbyte config schema --json > recipe.schema.json"

IMPORT_EXAMPLES = (
    "[bold]Examples[/]\n\nhalfbyte config import qlora.yml -o recipe.yaml\n\n"
    "halfbyte config import llama3_lora_sft.yaml --drop max_samples > recipe.yaml"
)

app = typer.Typer(
    help="List every setting, or read those of another tool.", no_args_is_help=True, rich_markup_mode="rich"
)


@app.callback()
def verbs() -> None:
    """List every setting, or read those of another tool."""


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


@app.command("import", epilog=IMPORT_EXAMPLES)
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Settings of axolotl, LLaMA-Factory, TRL, transformers or PEFT."),
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Recipe to write; without it, stdout.")
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(
            "--from", help="axolotl, llama-factory, peft, trl or transformers; else told by its keys."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop", metavar="KEY", help="Leave out a key although it changes the result; repeat for more."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier recipe.")] = False,
    as_json: Json = False,
) -> None:
    """Write the settings file of another tool as a recipe; nothing of it is left out in silence."""
    from halfbyte.errors import ConfigError
    from halfbyte.foreign.importing import import_file
    from halfbyte.foreign.tools import TOOLS

    if tool is not None and tool not in TOOLS:
        raise typer.BadParameter(f"{tool!r} is none of {', '.join(TOOLS)}", param_hint="--from")
    if output is not None and output.exists() and not overwrite:
        raise ConfigError("HB108", "a file is there", where=str(output), fix="name another, or --overwrite")
    imported = import_file(file, tool, drop or (), output.parent if output is not None else None)
    _validate(imported)
    if output is not None:
        output.write_text(imported.to_yaml(), encoding="utf-8")
    if as_json:
        print_json(_as_json(imported))
        return
    if output is None:
        STDOUT.print(imported.to_yaml(), end="", highlight=False, markup=False, soft_wrap=True)
    _tell(imported, output)


def _validate(imported: Imported) -> None:
    """Refuse values that no recipe may have; what the file does not say is a person's to put in."""
    from halfbyte.config import load_config

    load_config(None, [f"{name}='?'" for name in imported.missing], imported.nested())


def _as_json(imported: Imported) -> dict[str, Any]:
    return {
        "tool": imported.tool,
        "settings": imported.nested(),
        "from": {name: list(line.sources) for name, line in imported.lines.items()},
        "means_nothing": imported.idle,
        "dropped": imported.dropped,
        "missing": list(imported.missing),
        "notes": list(imported.notes),
    }


def _tell(imported: Imported, output: Path | None) -> None:
    """Say what was read, and what became of each key that is no setting."""
    from halfbyte.foreign.importing import by_reason

    said = [f"Read as a file of {imported.tool} (--from names another tool)."]
    for fate, keys in (("Means nothing here", imported.idle), ("Dropped", imported.dropped)):
        said += [f"{fate}: {', '.join(names)}: {why}" for why, names in by_reason(keys).items()]
    said += [f"Missing: {name}" for name in imported.missing]
    said += [f"Note: {note}" for note in imported.notes]
    if output is not None:
        said.append(f"Try it: halfbyte run {output} --dry-run")
    for line in said:
        STDERR.print(line, highlight=False, markup=False, soft_wrap=True)


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
