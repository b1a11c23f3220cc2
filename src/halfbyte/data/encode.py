"""Files of rows to a token file, in memory that does not grow with them but for two numbers a row.

It owns the order of the work (judge every row first, then write out and tokenise), what a token file is made from,
and when an earlier one is used again; it must not know which rows are trained on.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data import cache
from halfbyte.data.check import Checker, DataReport, Lengths, fault_of
from halfbyte.data.containers import row_files
from halfbyte.data.faults import Fault, Reading
from halfbyte.data.fingerprint import Fingerprint
from halfbyte.data.read import iter_rows
from halfbyte.data.token_file import CHUNK_BYTES, FORMAT, TokenFile, TokenWriter
from halfbyte.data.tokenise import ROWS_AT_ONCE, Tokeniser
from halfbyte.data.tokenizer import Encoder
from halfbyte.data.truncation import refuse_none_left
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.data.render import Renderer
    from halfbyte.data.row import Row
    from halfbyte.settings import DataConfig

Progress = Callable[[int, int], None]
LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy")
"""Whose versions may change what rows become."""


@dataclass(frozen=True)
class Encoded:
    """Rows of some files, tokenised.

    Attributes:
        file: The examples, in the order of the rows.
        report: What was counted in the rows.
        stop_ids: Ids at which generation ends: the stop tokens these rows teach, and the end of text.
    """

    file: TokenFile
    report: DataReport
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Encoding:
    """How rows are tokenised.

    Attributes:
        data: Format, longest row, and where tokenised rows are kept.
        renderer: Writes rows out, and holds the tokenizer.
        reading: How many faulty rows may be skipped; gets those that were, and each file's format.
        progress: Told how far each part of the work is.
        notes: Gets what a person should know of rows that were kept.
    """

    data: DataConfig
    renderer: Renderer
    reading: Reading
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)

    def encode(self, paths: Sequence[str]) -> Encoded:
        """Check and tokenise the rows of some files, or take what an earlier run made of the same.

        Raises:
            DataError: HB201 to HB226, each naming every faulty row; HB218 if what is made cannot be kept; HB227 if a
                file changes meanwhile.
        """
        files = row_files(paths)
        before = _states(files)
        facts = self._made_from(files)
        owner: _Passing | None = None
        if self.data.cache is False:
            owner = _Passing()
            store = owner.folder
        else:
            store = Path(self.data.cache) if isinstance(self.data.cache, str) else cache.cache_folder()
        key = cache.key_of(facts)
        found = self._kept(store, key)
        if found is None:
            self._say_what_differs(store, facts)
            skipped = len(self.reading.skipped)

            def fill(folder: Path) -> None:
                self._fill(folder, files, facts, skipped)
                if _states(files) != before:
                    what = "a file of rows changed while it was read"
                    raise DataError("HB227", what, where=", ".join(map(str, files)), fix="run again")

            found = TokenFile(cache.make(store, key, fill), self.progress)
        else:
            self.reading.skipped += [Fault(**fault) for fault in found.more["skipped"]]
            self.reading.formats.update(found.more["formats"])
        found.owner = owner
        report = found.more["report"]
        lengths = Lengths(**report["characters"])
        return Encoded(found, DataReport(**report | {"characters": lengths}), tuple(found.more["stop_ids"]))

    def _kept(self, store: Path, key: str) -> TokenFile | None:
        """What an earlier run kept, if it is still what it was."""
        folder = cache.find(store, key)
        if folder is None:
            return None
        try:
            return TokenFile(folder, self.progress)
        except DataError as error:
            self.notes.append(f"Tokenised rows of an earlier run are refused and made again: {error.what}.")
            cache.give_up(folder)
            return None

    def _fill(self, folder: Path, files: Sequence[Path], facts: dict[str, Any], skipped: int) -> None:
        """Write the token file of some files."""
        report = self._judge(files)
        tokeniser = Tokeniser(Encoder(self.renderer.tokenizer), self.data.max_length, reading=self.reading)
        done = kept = 0
        with TokenWriter(folder) as writer:
            again = iter_rows(files, self.data.format, Reading(self.reading.allowed))
            for part in _parts(row for row in again if not fault_of(row)):
                examples = tokeniser.take(part, self.renderer)
                for example, whole in zip(examples, tokeniser.wholes(len(examples)), strict=True):
                    if example.trained_tokens:
                        writer.add(example, whole)
                        kept += 1
                done += len(part)
                if self.progress is not None:
                    self.progress(done, report.rows)
            tokeniser.refuse()
            refuse_none_left(kept, self.data.max_length)
            writer.finish(
                {
                    "made_from": facts,
                    "report": asdict(report),
                    "stop_ids": list(tokeniser.stop_ids),
                    "skipped": [asdict(fault) for fault in self.reading.skipped[skipped:]],
                    "formats": {str(f): self.reading.formats[str(f)] for f in files},
                }
            )

    def _judge(self, files: Sequence[Path]) -> DataReport:
        """Read and check every row, so that what is wrong is told before the long work."""
        checker = Checker("sft", self.reading)
        nbytes = sum(file.stat().st_size for file in files)
        rows = iter_rows(files, self.data.format, self.reading)
        for part in _parts(rows):
            for row in part:
                checker.take(row)
            if self.progress is not None:  # characters, which are somewhat fewer than a file's bytes
                self.progress(min(checker.characters, nbytes), nbytes)
        return checker.report()

    def _made_from(self, files: Sequence[Path]) -> dict[str, Any]:
        """All that decides what rows become, as JSON values."""
        tokenizer = self.renderer.tokenizer
        fingerprint = Fingerprint.of(self.renderer)
        dated = "strftime_now" in self.renderer.template_text
        return {
            "files": [str(file) for file in files],
            "rows": self._digests(files),
            "chat format": [
                fingerprint.chat_format,
                fingerprint.template,
                *([str(date.today())] if dated else []),
            ],
            "tokenizer": [
                fingerprint.tokenizer,
                {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
                sorted(map(str, tokenizer.all_special_tokens)),
            ],
            "data.max_length": self.data.max_length,
            "data.format": self.data.format,
            "data.skip_bad_rows": self.reading.allowed - len(self.reading.skipped),
            "halfbyte": [FORMAT, code_digest()],
            "libraries": [version(name) for name in LIBRARIES],
        }

    def _digests(self, files: Sequence[Path]) -> list[str]:
        total, done, found = sum(file.stat().st_size for file in files), 0, []
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    if self.progress is not None:
                        self.progress(done, total)
            found.append(digest.hexdigest())
        return found

    def _say_what_differs(self, store: Path, facts: dict[str, Any]) -> None:
        """Tell why what was last kept of the same files is not used."""
        for kept in reversed(cache.kept_in(store)):
            earlier = TokenFile.kept_facts(kept.folder).get("made_from", {})
            if earlier.get("files") == facts["files"]:
                differing = [name for name, value in facts.items() if earlier.get(name) != value]
                self.notes.append(f"Rows are tokenised again: other {', '.join(differing)} than last time.")
                return


class _Passing:
    """A folder that is there as long as this object is."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="halfbyte-rows-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while part := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield part


def _states(files: Sequence[Path]) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]


def code_digest() -> str:
    """Digest of the modules that rows pass through on their way to tokens."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
