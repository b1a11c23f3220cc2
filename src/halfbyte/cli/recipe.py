"""The options that `run` and `train` share: a recipe file and what overrides it.

It owns how flags become settings; it must not know what the settings mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json, size

if TYPE_CHECKING:
    from halfbyte.pipeline import Rehearsal, RunResult
    from halfbyte.settings import Config

RecipeFile = Annotated[
    Path | None, typer.Argument(metavar="RECIPE.yaml", help="Settings file; --set overrides any of it.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as train.learning_rate=1e-4."),
]
Model = Annotated[str | None, typer.Option("--model", help="Folder of the base model.")]
Data = Annotated[list[str] | None, typer.Option("--data", help="File or folder of rows; repeat for more.")]
SkipBadRows = Annotated[
    int | None, typer.Option("--skip-bad-rows", metavar="N", help="Leave out up to this many faulty rows.")
]
Method = Annotated[str | None, typer.Option("--method", help="full, lora or qlora.")]
OutputDir = Annotated[str | None, typer.Option("--output-dir", help="Folder that gets all the run leaves.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in the output folder from its last checkpoint.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check settings, rows and model folder, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@dataclass(frozen=True)
class Flags:
    """Flags that override a recipe; None leaves it alone."""

    model: str | None
    data: Sequence[str] | None
    method: str | None
    output_dir: str | None
    skip_bad_rows: int | None

    def as_overrides(self) -> list[str]:
        """As settings; JSON strings are YAML, so that no path is read as anything but text."""
        named = {
            "model": self.model,
            "data.train": self.data,
            "method": self.method,
            "output_dir": self.output_dir,
            "data.skip_bad_rows": self.skip_bad_rows,
        }
        return [f"{name}={json.dumps(value)}" for name, value in named.items() if value not in (None, "", [])]


@dataclass(frozen=True)
class Wishes:
    """What is to be done with a recipe.

    Args:
        evaluate: Measure before and after.
        overwrite: Replace an earlier run.
        resume: Go on with an earlier run.
        dry_run: Stop before any work.
        as_json: Print for machines.
    """

    evaluate: bool
    overwrite: bool
    resume: bool
    dry_run: bool
    as_json: bool


def carry_out(recipe: Path | None, settings: Sequence[str] | None, flags: Flags, wishes: Wishes) -> None:
    """Read the recipe, run it or rehearse it, and print what came of it."""
    if wishes.overwrite and wishes.resume:
        raise typer.BadParameter("go on with an earlier run, or replace it: not both", param_hint="--resume")
    from halfbyte.config import load_config

    config = load_config(recipe, [*(settings or ()), *flags.as_overrides()])
    if wishes.dry_run:
        _rehearse(config, wishes)
        return
    from halfbyte.cli.summary import print_summary
    from halfbyte.pipeline import run
    from halfbyte.report.watch import Watch

    result = run(
        config,
        evaluate=wishes.evaluate,
        overwrite=wishes.overwrite,
        resume=wishes.resume,
        watch=Watch(STDERR),
    )
    if wishes.as_json:
        print_json(_as_json(result))
    else:
        print_summary(result, STDOUT)


def _as_json(result: RunResult) -> dict[str, Any]:
    return {
        "output_dir": str(result.folder),
        "result": str(result.result),
        **result.summary.as_dict(),
    }


def _rehearse(config: Config, wishes: Wishes) -> None:
    """What the run would do."""
    from halfbyte.pipeline import rehearse
    from halfbyte.report.watch import Watch

    found = rehearse(config, wishes.overwrite or wishes.resume, watch=Watch(STDERR))
    if wishes.as_json:
        planned = found.expected.planned.as_dict()
        own = {"largest_batch": asdict(found.trial), "training_seconds": found.seconds}
        print_json(_facts(found) | own | {"forecast": planned["forecast"], "forecast_why": planned["why"]})
    else:
        _print_rehearsal(found)


def _facts(found: Rehearsal) -> dict[str, Any]:
    """What was counted."""
    from halfbyte.data.order import Usage

    config = found.task.config
    return {
        "model": config.model,
        "task": config.task,
        "method": config.method,
        "output_dir": config.output_dir,
        **found.task.facts(),
        "steps": found.plan.total_steps,
        "first_epoch": asdict(Usage.of(found.plan.order)),
    }


def _print_rehearsal(found: Rehearsal) -> None:
    from halfbyte.cli.row_view import print_example
    from halfbyte.data.order import Usage
    from halfbyte.report.amounts import in_words
    from halfbyte.tasks.words import WordsTask
    from halfbyte.train.display import duration

    trial, peak = found.trial, size(found.trial.peak_rss_bytes)
    planned = found.expected.planned
    facts = _facts(found) | {
        "first_epoch": Usage.of(found.plan.order).described(),
        "largest_batch": f"{trial.tokens:,} tokens in {trial.seconds:.2f} s, {peak} at most for the whole process",
        "forecast": in_words(planned.forecast) if planned.forecast else f"none: {planned.why}",
        "training": f"about {duration(found.seconds)} at that speed",
    }
    STDOUT.print(
        "[bold]Dry run:[/] settings, rows and model are in order, and the largest batch fits; nothing was written."
    )
    for name, value in facts.items():
        text = f"{value:,}" if isinstance(value, int) else str(value)
        STDOUT.print(f"  {name.replace('_', ' '):<16} {text}", highlight=False, markup=False, soft_wrap=True)
    if isinstance(found.task, WordsTask):
        STDOUT.print("\n[bold]A row as the model sees it[/], what is learnt marked")
        print_example(found.task.rows.train[0], found.task.tokenizer, STDOUT)
