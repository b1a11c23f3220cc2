"""Tokenised rows in a folder of files that are mapped into memory, not read into it.

It owns the folder's format, its digests, and examples that lie in it; it must not know rows as they were, templates,
or why a folder is made.

    ids.bin      int32 token ids of every row, each followed by its prompt if it does not begin with that
    trained.bin  one byte for each of them: whether it is a target
    answers.bin  the last answers, UTF-8, one after the other
    rows.bin     `ROW` for each row, in order
    facts.json   format, size and SHA-256 of each of these, names of the rows' files, and whatever else was to be kept
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.tokenise import Example
from halfbyte.errors import DataError

FORMAT = 1
FACTS = "facts.json"
ROW = np.dtype(
    [
        ("id", "<u8"),  # content hash
        ("line", "<u8"),
        ("begin", "<u8"),  # where its tokens begin in ids.bin, in tokens
        ("prompt", "<u8"),  # as begin
        ("answer", "<u8"),  # in bytes of answers.bin
        ("source", "<u4"),  # number of its file
        ("length", "<u4"),  # tokens that were kept
        ("whole", "<u4"),  # tokens before any were cut off
        ("trained", "<u4"),  # targets
        ("prompt_length", "<i4"),  # -1: it has none
        ("answer_length", "<i4"),  # -1: it has none
        ("aligned", "?"),
    ]
)
ARRAYS = {"ids": np.dtype("<i4"), "trained": np.dtype("?"), "answers": np.dtype("u1"), "rows": ROW}
CHUNK_BYTES = 2**22
Progress = Callable[[int, int], None]


class _Hashed:
    """A file that is written once, from its beginning, with its digest."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()
        self.nbytes = 0

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self._digest.update(content)
        self.nbytes += len(content)

    def close(self) -> dict[str, Any]:
        """Bring it to the disk; its size and digest."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"bytes": self.nbytes, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._stream.close()


class TokenWriter:
    """Writes examples into a folder, each once; the folder is whole when `finish` returns.

    Args:
        folder: Is empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: _Hashed(folder / f"{name}.bin") for name in ARRAYS}
        self._sources: dict[str, int] = {}
        self._id_range = (0, 0)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()

    def add(self, example: Example, whole: int) -> None:
        """Append an example.

        Args:
            example: As it is learnt from.
            whole: Tokens it had before any were cut off.
        """
        row = np.zeros((), ROW)
        source, _, line = example.where.rpartition(":")
        row["id"], row["line"] = int(example.id, 16), int(line)
        row["source"] = self._sources.setdefault(source, len(self._sources))
        row["begin"] = row["prompt"] = self._tokens
        row["length"], row["whole"] = len(example.input_ids), whole
        row["trained"], row["aligned"] = example.trained_tokens, example.aligned
        self._write_tokens(example.input_ids, example.trained)
        row["prompt_length"] = row["answer_length"] = -1
        if (prompt := example.prompt_ids) is not None:
            row["prompt_length"] = len(prompt)
            if not np.array_equal(example.input_ids[: len(prompt)], prompt):
                row["prompt"] = self._tokens
                self._write_tokens(prompt, np.zeros(len(prompt), np.bool_))
        if example.answer is not None:
            answer = example.answer.encode()
            row["answer"], row["answer_length"] = self._files["answers"].nbytes, len(answer)
            self._files["answers"].write(answer)
        self._files["rows"].write(row.tobytes())

    @property
    def _tokens(self) -> int:
        return self._files["trained"].nbytes

    def _write_tokens(self, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> None:
        lowest, highest = self._id_range
        self._id_range = int(ids.min(initial=lowest)), int(ids.max(initial=highest))
        self._files["ids"].write(ids.astype("<i4").tobytes())
        self._files["trained"].write(trained.tobytes())

    def finish(self, more: Mapping[str, Any]) -> None:
        """Bring all to the disk.

        Args:
            more: JSON values to be kept with it.
        """
        arrays = {name: file.close() for name, file in self._files.items()}
        facts = {
            "format": FORMAT,
            "arrays": arrays,
            "sources": list(self._sources),
            "id_range": self._id_range,
            "more": more,
        }
        file = _Hashed(self._folder / FACTS)
        file.write(json.dumps({"sha256": _digest(facts), "facts": facts}).encode())
        file.close()


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _facts_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / FACTS).read_bytes())
    facts: dict[str, Any] = found["facts"]
    if _digest(facts) != found["sha256"]:
        raise ValueError(f"{FACTS} is not what was written")
    return facts


class TokenFile:
    """A folder that `TokenWriter` wrote, mapped into memory.

    Args:
        folder: The folder.
        progress: Told of bytes proven and bytes in all.

    Attributes:
        rows: `ROW` of each row, (n,).
        sources: Names of the rows' files, by their numbers.
        id_range: Lowest and highest token id, 0 among them.
        digests: SHA-256 of each array.
        more: What was kept with it.
        owner: Whatever has to last as long as the file is in use, such as the temporary folder it lies in.

    Raises:
        DataError: HB219 if a file of it is missing, or is not what was written.
    """

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self._folder = folder
        self.owner: object = None
        try:
            facts = _facts_of(folder)
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}, expected {FORMAT}")
            self.digests: dict[str, str] = {name: facts["arrays"][name]["sha256"] for name in ARRAYS}
            self.sources: list[str] = facts["sources"]
            self.more: dict[str, Any] = facts["more"]
            self.id_range: tuple[int, int] = tuple(facts["id_range"])
            sizes = {name: int(facts["arrays"][name]["bytes"]) for name in ARRAYS}
            self._arrays = {name: self._mapped(name, size) for name, size in sizes.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self._prove(progress)
        self.rows = self._arrays["rows"]
        self._ids, self._trained = self._arrays["ids"], self._arrays["trained"]

    @staticmethod
    def kept_facts(folder: Path) -> dict[str, Any]:
        """What was kept with a token file, without a look at its rows; nothing if that cannot be told."""
        try:
            found: dict[str, Any] = _facts_of(folder)["more"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found

    def _damaged(self, what: str) -> DataError:
        return DataError("HB219", what, where=str(self._folder), fix="remove the folder: it is made again")

    def _mapped(self, name: str, size: int) -> NDArray[Any]:
        path = self._folder / f"{name}.bin"
        if path.stat().st_size != size:
            raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, expected {size:,}")
        if size == 0:
            return np.zeros(0, ARRAYS[name])
        with path.open("rb") as stream:
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), ARRAYS[name])

    def _prove(self, progress: Progress | None) -> None:
        """Read every byte once: what is learnt from must be what was written."""
        total, done = sum(array.nbytes for array in self._arrays.values()), 0
        for name, expected in self.digests.items():
            digest = hashlib.sha256()
            with (self._folder / f"{name}.bin").open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != expected:
                raise self._damaged(
                    f"{name}.bin is not what was written: its SHA-256 is {digest.hexdigest()}"
                )

    def where(self, at: int) -> str:
        """`file:line` of a row."""
        row = self.rows[at]
        return f"{self.sources[row['source']]}:{row['line']}"

    def example(self, at: int) -> Example:
        """The example of a row; its arrays are the file's and cannot be written to."""
        row = self.rows[at]
        begin, length, prompt = int(row["begin"]), int(row["length"]), int(row["prompt"])
        answer, answered = int(row["answer"]), int(row["answer_length"])
        return Example(
            input_ids=self._ids[begin : begin + length],
            trained=self._trained[begin : begin + length],
            prompt_ids=self._ids[prompt : prompt + row["prompt_length"]]
            if row["prompt_length"] >= 0
            else None,
            answer=self._arrays["answers"][answer : answer + answered].tobytes().decode()
            if answered >= 0
            else None,
            id=f"{row['id']:016x}",
            where=self.where(at),
            truncated=bool(row["length"] < row["whole"]),
            aligned=bool(row["aligned"]),
        )


class StoredExamples(Sequence[Example]):
    """Some examples of a token file, in any order, some of them more than once.

    Args:
        file: The token file.
        order: Which of its rows, (n,).
    """

    def __init__(self, file: TokenFile, order: NDArray[np.int64]) -> None:
        self.file, self.order = file, order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> StoredExamples: ...

    def __getitem__(self, at: int | slice) -> Example | StoredExamples:
        if isinstance(at, slice):
            return StoredExamples(self.file, self.order[at])
        return self.file.example(int(self.order[at]))

    def where(self, at: int) -> str:
        """`file:line` of one of them."""
        return self.file.where(int(self.order[at]))

    def numbers(self, name: str) -> NDArray[np.int64]:
        """What `ROW` has under a name, of each, (n,)."""
        found: NDArray[np.int64] = self.file.rows[name][self.order].astype(np.int64)
        return found

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each, (n,)."""
        return self.numbers("length")

    @cached_property
    def sha256(self) -> str:
        """Digest of all that is learnt from them, in order: the file's own digests and which of its rows they are."""
        digest = hashlib.sha256()
        for name in ("ids", "trained"):
            digest.update(self.file.digests[name].encode())
        for name in ("begin", "length"):
            digest.update(self.numbers(name).astype("<i8").tobytes())
        return digest.hexdigest()
