"""Run alone in a fresh process: quantises a folder and ends itself, by SIGKILL, at a certain place.

It is no test itself; `test_quantising.py` runs it and judges. Usage: stopped_quantising.py SOURCE TARGET PLACE:NUMBER
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from halfbyte.errors import ModelError
from halfbyte.model import pieces, quantised_writer, quantising
from halfbyte.model.journal import Journal
from halfbyte.model.quantised_writer import FileWriter
from halfbyte.quant.weight import QuantSpec


def kill() -> None:
    """End this process as the system would, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at(owner: Any, name: str, number: int, *, before: bool = False) -> None:
    """End the process before or after the so-manieth call of a function."""
    function, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == number:
            kill()
        result = function(*arguments, **named)
        if calls[0] == number:
            kill()
        return result

    setattr(owner, name, counted)


def tear(number: int) -> None:
    """End the process when half of a line is in the journal."""
    append, lines = Journal._append, [0]

    def torn(self: Journal, line: Any) -> None:
        lines[0] += "part" in line
        if lines[0] == number:
            self._stream.write(b'{"part": "model.lay')
            self._stream.flush()
            kill()
        append(self, line)

    Journal._append = torn  # type: ignore[method-assign]


def main(source: Path, target: Path, place: str, number: int) -> None:
    """Quantise, and do not come to the end."""
    torch.set_num_threads(1)
    pieces.PIECE_BYTES, quantising.SYNC_BYTES = 4096, 10_000
    quantised_writer.STAGE_BYTES = 8192
    {
        "put": lambda: stop_at(FileWriter, "put", number),
        "flush": lambda: stop_at(FileWriter, "_flush", number),
        "unit": lambda: stop_at(Journal, "add", number, before=True),  # data written, journal not
        "torn": lambda: tear(number),
        "noted": lambda: stop_at(Journal, "add", number),
        "synced": lambda: stop_at(FileWriter, "sync", number),
        "finish": lambda: stop_at(FileWriter, "finish", number),
        "origin": lambda: stop_at(quantising, "write_origin", number),
        "renamed": lambda: stop_at(quantising, "put_in_place", number),
        "replaced": lambda: stop_at(Path, "rename", number),
        "limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (number, number)),
    }[place]()
    try:
        quantising.quantise_folder(quantising.prepare(source, QuantSpec()), target)
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    where, _, how_often = sys.argv[3].partition(":")
    main(Path(sys.argv[1]), Path(sys.argv[2]), where, int(how_often))
