"""`halfbyte quantize`: a model folder in 4 bits that bitsandbytes reads.

It owns the verb's options; it must not know how weights are quantised or written.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from halfbyte.cli.consoles import STDERR, STDOUT, print_json, size
from halfbyte.cli.recipe import Json

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "halfbyte quantize models/base models/base-nf4\n\n"
    "halfbyte quantize models/base models/base-nf4 --scales mse"
)


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model in 16 or 32 bits.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    format: Annotated[Literal["nf4", "fp4"], typer.Option("--format", help="4-bit data type.")] = "nf4",  # noqa: A002
    scales: Annotated[
        Literal["absmax", "mse"],
        typer.Option("--scales", help="absmax: as bitsandbytes; mse: least squared error, same bytes."),
    ] = "absmax",
    as_json: Json = False,
) -> None:
    """Write a model in 4 bits, in the safetensors form that transformers with bitsandbytes loads."""
    from halfbyte.model.files import open_model_folder
    from halfbyte.model.loading import load
    from halfbyte.model.precision import stored_dtype
    from halfbyte.model.saving import save_quantized
    from halfbyte.quant.weight import QuantSpec
    from halfbyte.report.watch import Watch
    from halfbyte.train.methods import ModelSize

    began = time.perf_counter()
    folder = open_model_folder(model)
    watch = Watch(STDERR)
    with watch.part("quantize") as part:
        spec = QuantSpec(format=format, scales=scales)
        loaded = load(model, quantization=spec, dtype=stored_dtype(folder), progress=part.progress)
    with watch.part("write"):
        save_quantized(loaded, out)
    before = sum(tensor.nbytes for tensor in folder.tensors.values())
    after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    facts = {
        "output": str(out),
        "format": format,
        "scales": scales,
        "bytes_before": before,
        "bytes_after": after,
        "parameters": ModelSize.of(loaded).total,
        "seconds": time.perf_counter() - began,
    }
    if as_json:
        print_json(facts)
        return
    smaller = f"{size(after)}, was {size(before)} ({before / after:.2f} times smaller)"
    text = f"{out}: {smaller}; {format}, scales {scales}"
    STDOUT.print(text, highlight=False, markup=False, soft_wrap=True)
