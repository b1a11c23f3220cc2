"""`halfbyte plan`: what tuning a model takes, which ways fit, and the recipe of the best of them.

It owns the verb's options and its table; it must not know how anything is forecast or chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json
from halfbyte.cli.recipe import Json
from halfbyte.errors import PlanError

if TYPE_CHECKING:
    from halfbyte.plan.choose import Choice, Limits
    from halfbyte.plan.hardware import Hardware
    from halfbyte.plan.terms import Estimate
    from halfbyte.plan.work import Work
    from halfbyte.settings import Config

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte plan models/base --data rows.jsonl --out recipe.yaml\n\n"
    "halfbyte plan models/base/config.json --tokens 2000000 --max-length 2048 --memory-gb 16\n\n"
    "halfbyte plan models/base --tokens 5e6 --deadline 8h --picture memory.svg\n\n"
    "halfbyte plan models/base --tokens 5e6 --hardware l4 --budget 5\n\n"
    "halfbyte plan --audit models\n\n"
    "halfbyte plan --history"
)
TOKENS = "1e6"
MAX_LENGTH = 1024
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}


def plan(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, or a bare config.json; with --audit and --history any folders.",
        ),
    ] = None,
    *,
    data: Annotated[list[str] | None, typer.Option("--data", help="File or folder of rows.")] = None,
    tokens: Annotated[
        str, typer.Option("--tokens", help="Tokens to train on, where no data is named.")
    ] = TOKENS,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens per row.")] = MAX_LENGTH,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows per pass.")] = 1,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Settings that all ways have in common.")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="A machine by name; else this one.")
    ] = None,
    memory_gb: Annotated[float | None, typer.Option("--memory-gb", min=0.01, help="Memory to take.")] = None,
    deadline: Annotated[str | None, typer.Option("--deadline", help="Longest training: 90m, 8h, 2d.")] = None,
    budget: Annotated[float | None, typer.Option("--budget", min=0.0, help="Most money, in USD.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the recommended recipe here.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine anew.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Also smaller states and activations.")] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw each way's memory, as SVG.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Rank model folders for 4 bits and low-rank tuning.")
    ] = False,
    history: Annotated[
        bool, typer.Option("--history", help="What past runs took against their forecasts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Forecast memory, time, cost and disk of every way to tune a model, and recommend one that fits."""
    if audit or history:
        _look_at([Path(each) for each in folders or ()], audit, history, as_json)
        return
    if not folders or len(folders) > 1:
        raise typer.BadParameter("name one model", param_hint="MODEL")
    from halfbyte.plan.choose import nothing_fits, recommended
    from halfbyte.plan.hardware import find_hardware, named_hardware

    config = _settings(folders[0], recipe, data, (max_length, batch))
    machine = find_hardware(Path(config.output_dir)) if hardware is None else named_hardware(hardware)
    limits = _limits(machine, memory_gb, deadline, budget)
    found, impossible = _choices(config, _work(config, data, tokens), (machine, limits), calibrate, every)
    best = recommended(found) if any(choice.fits for choice in found) else None
    if as_json:
        print_json(_as_json(found, impossible, best, machine))
    else:
        _show(found, impossible, best, (machine, limits))
    if picture is not None:
        _draw(found, limits, picture)
    if best is None:
        raise nothing_fits(found)
    if out is not None:
        _write_recipe(best, out)


def _write_recipe(best: Choice, out: Path) -> None:
    out.write_text(recipe_text(best), encoding="utf-8")
    STDERR.print(f"The recipe is in {out}.", markup=False, highlight=False)


def _limits(machine: Hardware, memory_gb: float | None, deadline: str | None, budget: float | None) -> Limits:
    """What may be taken; never more memory than this machine has free."""
    from halfbyte.plan.choose import Limits

    limit = int(memory_gb * 1e9) if memory_gb is not None else machine.memory_bytes
    if machine.is_here:
        limit = min(limit, machine.memory_bytes)
    return Limits(limit, machine.disk_bytes, None if deadline is None else seconds_of(deadline), budget)


def _choices(
    config: Config, work: Work, on: tuple[Hardware, Limits], again: bool, every_saving: bool
) -> tuple[list[Choice], dict[str, str]]:
    """Every way of tuning on a machine, measured or of the table."""
    from halfbyte.govern.manifest import Hardware as Here
    from halfbyte.plan.calibrate import calibrate
    from halfbyte.plan.choose import Asked, choices
    from halfbyte.plan.expect import MEASURED_RUNTIME
    from halfbyte.plan.forecast import Machine, dtype_of
    from halfbyte.plan.history import runs_beside
    from halfbyte.plan.work import Sizes
    from halfbyte.version import __version__

    machine, limits = on
    with STDERR.status("measuring this machine (a few seconds, once)"):
        calibration = calibrate(config, work, Sizes.of(config.model, dtype_of(config)), again=again)
    here, past = Here.here(), runs_beside(Path(config.output_dir))
    if machine.speeds is not None:
        calibration, past = calibration.on(machine.name, machine.speeds, machine.date), ()
    where = Machine(
        limits.memory_bytes,
        calibration.runtime(config),
        MEASURED_RUNTIME,
        calibration,
        past,
        (here.processor, here.cores, __version__),
    )
    return choices(config, Asked(work, where, machine, limits), every_saving=every_saving)


def _look_at(folders: list[Path], audit: bool, history: bool, as_json: bool) -> None:
    """Print what models or past runs are like instead of a plan."""
    from halfbyte.cli import plan_audit, plan_history

    if audit and history:
        raise typer.BadParameter("look at models, or at past runs: not both", param_hint="--audit")
    if history:
        plan_history.history(folders, as_json=as_json)
        return
    if not folders:
        raise typer.BadParameter("name the folders of the models", param_hint="--audit")
    plan_audit.audit(folders, as_json=as_json)


def seconds_of(deadline: str) -> float:
    """Seconds of a time such as `90m`, `8h` or `2d`.

    Raises:
        PlanError: HB706 for anything else.
    """
    number, unit = deadline[:-1], deadline[-1:].lower()
    try:
        value = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        fix = "write minutes, hours or days, such as 90m, 8h or 2d"
        raise PlanError("HB706", f"{deadline!r} is no time", where="--deadline", fix=fix)
    return value


def recipe_text(best: Choice) -> str:
    """The recipe of a choice as YAML that `halfbyte run` takes, with why it was chosen."""
    forecast = best.forecast
    lines = [
        f"# halfbyte plan: {best.name}; {forecast.peak_bytes / 1e9:.2f} GB at its peak, {_time(forecast.seconds)}",
        *(f"# first: {command}" for command in best.before),
    ]
    return "\n".join([*lines, best.config.to_yaml()])


def _settings(model: str, recipe: Path | None, data: list[str] | None, sizes: tuple[int, int]) -> Config:
    from halfbyte.config import load_config

    base = {
        "model": str(Path(model).parent) if Path(model).name == "config.json" else model,
        "data": {"train": data or "rows.jsonl", "max_length": sizes[0]},
        "train": {"batch_size": sizes[1]},
    }
    if recipe is None:
        return load_config(None, base=base)
    return load_config(recipe, [f"model={base['model']}"], base)


def _work(config: Config, data: list[str] | None, tokens: str) -> Work:
    """The work of real rows, or of as many tokens in rows of the longest that are allowed."""
    from halfbyte.plan.work import Work

    if data:
        from halfbyte.tasks.known import prepare

        task = prepare(config)
        return Work.of_task(task)
    try:
        count = int(float(tokens))
    except ValueError:
        count = 0
    if count < 1:
        raise PlanError(
            "HB706", f"{tokens!r} is no number of tokens", where="--tokens", fix="such as 2000000 or 2e6"
        )
    rows = max(1, round(count / config.data.max_length))
    return Work.of([config.data.max_length] * rows, config)


def _draw(found: list[Choice], limits: Limits, picture: Path) -> None:
    from halfbyte.report.memory_picture import memory_picture

    memory_picture({choice.name: choice.forecast.memory for choice in found}, limits.memory_bytes, picture)
    STDERR.print(f"The picture is in {picture}.", markup=False, highlight=False)


def _as_json(
    found: list[Choice], impossible: dict[str, str], best: Choice | None, machine: Hardware
) -> dict[str, Any]:
    return {
        "hardware": {"name": machine.name, "memory_bytes": machine.memory_bytes, "source": machine.source},
        "choices": [
            {
                "name": choice.name,
                "fits": choice.fits,
                "lacks": list(choice.lacks),
                "before": list(choice.before),
                "forecast": choice.forecast.as_dict(),
            }
            for choice in found
        ],
        "not_possible": impossible,
        "recommended": None if best is None else best.name,
        "recipe": None if best is None else best.config.model_dump(),
    }


def _show(
    found: list[Choice], impossible: dict[str, str], best: Choice | None, on: tuple[Hardware, Limits]
) -> None:
    from rich import box
    from rich.table import Table

    machine, limits = on
    table = Table(
        box=box.SIMPLE,
        padding=(0, 0, 0, 1),
        title=f"{machine.name}; {limits.memory_bytes / 1e9:.1f} GB of memory",
    )
    table.add_column("way", min_width=16)
    for name in ("peak", "base", "trained", "activ.", "loss", "buffers", "rest", "step", "all", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for choice in found:
        memory = choice.forecast.memory
        trained = memory.adapters + memory.gradients + memory.optimizer
        parts = (memory.base, trained, memory.activations, memory.loss, memory.buffers, memory.runtime)
        table.add_row(
            choice.name,
            f"{memory.total / 1e9:.2f}",
            *(f"{part / 1e9:.2f}" for part in parts),
            _time(choice.forecast.step_seconds),
            _time(choice.forecast.seconds),
            _money(choice.forecast.cost),
            "yes" if choice.fits else "no",
            style="bold" if choice is best else "" if choice.fits else "dim",
        )
    STDOUT.print(table)
    STDOUT.print("Memory in GB at the moment of the highest peak; times are the likely ones.", style="dim")
    for name, why in impossible.items():
        STDOUT.print(f"{name}: {why}", style="dim", markup=False, highlight=False)
    for choice in found:
        if not choice.fits:
            STDOUT.print(f"{choice.name}: {'; '.join(choice.lacks)}", markup=False, highlight=False)
    if best is not None:
        why = f"Recommended: {best.name}: of full, lora and qlora the first that fits, in its fastest way."
        STDOUT.print(why, style="bold", highlight=False)
        for command in best.before:
            STDOUT.print(f"First: {command}", markup=False, highlight=False)


def _time(seconds: Estimate) -> str:
    if seconds.mid is None:
        return "unknown"
    value = seconds.mid
    if value < 60:
        return f"{value:.2f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


def _money(cost: Estimate) -> str:
    return "unknown" if cost.mid is None else f"{cost.mid:.2f} {cost.unit}"
