"""A ledger is what was written, or it is refused with the reason; nothing in between is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.plan.ledgers import forecast, ledger, write_run

from halfbyte.plan.ledger import LEDGER, PLAN, Factors, Planned, Refused, _digest, read_ledger, read_plan


def test_both_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    took, factors = ledger(earlier=[ledger().as_dict()]), Factors(1.5, 0.75, 4, "", ((1.0, 2.0), (0.5, 1.0)))
    folder = write_run(tmp_path / "run", took, forecast(), factors)
    assert read_ledger(folder) == took
    assert read_plan(folder) == Planned(forecast(), factors)


def test_a_run_without_a_forecast_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ledger())
    assert read_plan(folder) == Planned(None)
    assert json.loads((folder / PLAN).read_text(encoding="utf-8"))["forecast"] is None


def test_a_folder_without_files_has_nothing_to_read(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) is None
    assert read_plan(tmp_path) is None


def _resigned(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    changed = {name: value for name, value in (content | changes).items() if name != "sha256"}
    return {**changed, "sha256": _digest(changed)}


@pytest.mark.parametrize("size", [0, 1, 100, -2])
def test_a_torn_file_is_refused(tmp_path: Path, size: int) -> None:
    folder = write_run(tmp_path / "run", ledger())
    file = folder / LEDGER
    file.write_bytes(file.read_bytes()[:size])
    refused = read_ledger(folder)
    assert isinstance(refused, Refused)
    assert refused.file == file
    assert "not JSON" in refused.why


def test_an_edited_number_is_noticed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ledger(), forecast())
    for name, read in ((LEDGER, read_ledger), (PLAN, read_plan)):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("2.0", "1.9", 1), encoding="utf-8")
        refused = read(folder)
        assert isinstance(refused, Refused)
        assert "edited or torn" in refused.why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "not of version 1"),
        ({"state": "fine"}, "state"),
        ({"steps": "10"}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"memory": None}, "memory"),
        ({"more": 1}, "more"),
        ({"energy": {"unit": "Wh"}}, "energy"),
    ],
)
def test_a_foreign_file_with_a_digest_is_refused_too(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    folder = write_run(tmp_path / "run", ledger())
    content = _resigned(ledger().as_dict(), **changes)
    (folder / LEDGER).write_text(json.dumps(content), encoding="utf-8")
    refused = read_ledger(folder)
    assert isinstance(refused, Refused)
    assert why in refused.why


@pytest.mark.parametrize("text", ["[]", "3", '"ledger"', "{}", "null"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text, encoding="utf-8")
    assert isinstance(read_ledger(tmp_path), Refused)
