"""`halfbyte quantize`: a model folder in 4 bits that bitsandbytes reads.

It owns the verb's options and what is printed; it must not know how weights are quantised or written.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json, size
from halfbyte.cli.recipe import Json

if TYPE_CHECKING:
    from halfbyte.model.quantising import Quantisation
    from halfbyte.quant.weight import QuantSpec

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte quantize models/base models/base-nf4\n\n"
    "halfbyte quantize models/base models/base-nf4 --scales mse\n\n"
    "halfbyte quantize models/base models/base-nf4 --dry-run\n\n"
    "halfbyte quantize models/base-nf4 --verify"
)


def quantize(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder of the model; with --verify, one in 4 bits.")
    ],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder to write.")] = None,
    *,
    format: Annotated[Literal["nf4", "fp4"], typer.Option("--format", help="4-bit data type.")] = "nf4",  # noqa: A002
    scales: Annotated[
        Literal["absmax", "mse"],
        typer.Option("--scales", help="absmax: as bitsandbytes; mse: least squared error, same bytes."),
    ] = "absmax",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, then stop.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check that every byte of a folder in 4 bits is as it was written."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model in 4 bits, in the safetensors form that transformers with bitsandbytes loads.

    Memory for two of its largest weights suffices, whatever its size. Interrupted, the same command goes on.
    """
    from halfbyte.quant.weight import QuantSpec

    if verify:
        if out is not None or dry_run:
            raise typer.BadParameter("takes the folder in 4 bits, and nothing else", param_hint="--verify")
        _print(_verified(model), as_json)
    elif out is None:
        raise typer.BadParameter("name the folder to write", param_hint="OUT")
    else:
        _print(_quantised(model, out, QuantSpec(format=format, scales=scales), dry_run), as_json)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    text = facts.pop("text")
    if as_json:
        print_json(facts)
    else:
        STDOUT.print(text, highlight=False, markup=False, soft_wrap=True)


def _verified(folder: Path) -> dict[str, Any]:
    from halfbyte.errors import ModelError
    from halfbyte.model.quantised_file import read_digests
    from halfbyte.report.watch import Watch

    digests = read_digests(folder)
    if digests is None:
        raise ModelError(
            "HB366",
            "there are no digests of its weights",
            where=str(folder),
            fix="name a folder that halfbyte quantize wrote, or quantise the model with it",
        )
    with Watch(STDERR).part("verify") as part:
        digests.check_all(part.progress)
    return {
        "text": f"{folder}: {size(digests.file_bytes)} in {len(digests.units)} parts, all as they were written",
        "folder": str(folder),
        "bytes": digests.file_bytes,
        "parts": len(digests.units),
        "ok": True,
    }


def _quantised(source: Path, out: Path, spec: QuantSpec, dry_run: bool) -> dict[str, Any]:
    from halfbyte.model.quantising import prepare, quantise_folder
    from halfbyte.report.watch import Watch

    began = time.perf_counter()
    watch = Watch(STDERR)
    work = prepare(source, spec)
    facts = _facts(work, out, spec)
    smaller = f"{size(facts['bytes_after'])}, was {size(facts['bytes_before'])}"
    smaller += f" ({facts['bytes_before'] / facts['bytes_after']:.2f} times smaller)"
    if dry_run:
        needed, free = facts["bytes_needed"], facts["bytes_free"]
        enough = "enough" if needed <= free else "TOO LITTLE"
        text = f"{out} would be {smaller}; {size(needed)} of disk are needed, {size(free)} are free: {enough}"
        return facts | {"text": text}
    with watch.part("quantize") as part:
        try:
            quantise_folder(work, out, progress=part.progress, say=watch.note)
        except KeyboardInterrupt:
            watch.note(f"What is finished stays in {work.partial(out)}; the same command goes on from there.")
            raise
        seconds = time.perf_counter() - began
        part.say(f"{facts['bytes_before'] / seconds / 1e9:.2f} GB/s read")
    text = f"{out}: {smaller}; {spec.format}, scales {spec.scales}"
    return facts | {"text": text, "seconds": seconds}


def _facts(work: Quantisation, out: Path, spec: QuantSpec) -> dict[str, Any]:
    from halfbyte.train.methods import ModelSize

    needed, free = work.disk_bytes(out)
    return {
        "output": str(out),
        "format": spec.format,
        "scales": spec.scales,
        "bytes_before": work.source_bytes,
        "bytes_after": work.layout.file_bytes,
        "bytes_needed": needed,
        "bytes_free": free,
        "parameters": ModelSize.of(work.model).total,
    }
