"""`halfbyte plan --audit`: model folders ranked by what 4 bits and low-rank tuning would bring.

It owns how that looks; it must not know how models are read or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.consoles import STDERR, STDOUT, print_json, size

if TYPE_CHECKING:
    from rich.table import Table

    from halfbyte.plan.audit import Audit, Fault

COLUMNS: dict[str, Callable[[Audit], str]] = {
    "model": lambda a: a.folder.name,
    "parameters": lambda a: f"{a.parameters:,}",
    "now": lambda a: size(a.bytes_now),
    "in 4 bits": lambda a: f"is in {a.in_4bit}" if a.in_4bit else size(a.bytes_4bit),
    "error": lambda a: _percent(a.error_absmax),
    "error mse": lambda a: _percent(a.error_mse),
    "outliers": lambda a: f"{a.outliers:.1e}",
    "90 %": lambda a: _percent(a.directions(90)),
    "99 %": lambda a: _percent(a.directions(99)),
    "trained": lambda a: f"{a.tuning.adapter_parameters:,}",
    "memory": lambda a: size(a.tuning.base_bytes + a.tuning.state_bytes),
}
MEANINGS = (
    "error: relative root mean square of what NF4 changes in the linear weights, with absmax and least-error scales",
    "outliers: share of weights more than 6 root mean squares from zero",
    "90 %, 99 %: mean share of a matrix's directions that holds so much of its energy",
    "trained: adapter parameters at rank {r}; memory: base in 4 bits, adapters, gradients, AdamW; no activations",
)


def audit(
    folders: Sequence[Path],
    *,
    r: int = 16,
    spectra: bool = True,
    as_json: bool = False,
    markdown: bool = False,
) -> None:
    """Read model folders, measure their linear layers, and print them ranked.

    Args:
        folders: Model folders, or folders that hold some.
        r: Rank of the tuning run that is reckoned.
        spectra: Measure singular values, which takes most of the time.
        as_json: Print JSON.
        markdown: Print a Markdown table.

    Raises:
        PlanError: HB711 if there is no model.
    """
    from halfbyte.plan.audit import NOT_MEASURED, RULES, audit_folders, find_models
    from halfbyte.report.watch import Watch

    found = find_models(folders)
    with Watch(STDERR).part("audit") as part:
        audits, faults = audit_folders(found, r=r, spectra=spectra, progress=part.progress)
        part.say(f"{len(audits)} of {len(found)} model folders")
    if as_json:
        print_json(
            {
                "rules": list(RULES),
                "audits": [one.as_dict() for one in audits],
                "faults": [{"folder": str(fault.folder), "why": fault.why} for fault in faults],
            }
        )
        return
    rows = [[cell(one) for cell in COLUMNS.values()] for one in audits]
    if markdown:
        for cells in (list(COLUMNS), ["---"] * len(COLUMNS), *rows):
            _say("| " + " | ".join(cells) + " |")
        _say("")
    elif rows:
        STDOUT.print(_table(rows))
    for meaning in MEANINGS:
        _say("  " + meaning.format(r=r))
    _say(f"  cost in quality: {NOT_MEASURED}")
    _say_expectations(audits, RULES)
    _say_faults(faults)


def _say_expectations(audits: Sequence[Audit], rules: tuple[str, ...]) -> None:
    """What to expect of each model, and the order for low-rank tuning."""
    from halfbyte.plan.audit import by_low_rank

    _say(f"\nRanked for {rules[0]}.")
    low_rank = by_low_rank(audits)
    if low_rank:
        _say(f"Ranked for {rules[1]}: {', '.join(one.folder.name for one in low_rank)}.")
    for one in audits:
        _say(f"\n{one.folder}")
        for line in one.expectations():
            _say(f"  {line}")


def _say_faults(faults: Sequence[Fault]) -> None:
    if faults:
        _say(f"\nNot audited: {len(faults)}")
    for fault in faults:
        _say(f"  {fault.folder}: {fault.why}")


def _table(rows: list[list[str]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    return table


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _say(text: str) -> None:
    STDOUT.print(text, highlight=False, markup=False, soft_wrap=True)
