"""Promises of the manifest: digests, versions and hardware, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from halfbyte.govern.manifest import Hardware, manifest, versions


def test_files_are_named_with_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"abc")
    (tmp_path / "notes.md").write_bytes(b"not part of a model")
    rows = tmp_path / "rows.csv"
    rows.write_bytes(b"")
    found = manifest("0.0", 7, tmp_path, [rows], {"method": "lora"})
    # SHA-256 of "abc" and of nothing, FIPS 180-2
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found["base"] == [{"path": str(tmp_path / "config.json"), "bytes": 3, "sha256": abc}]
    assert found["data"] == [{"path": str(rows), "bytes": 0, "sha256": empty}]
    assert (found["seed"], found["method"]) == (7, "lora")
    json.dumps(found)


def test_an_absent_package_is_none_not_a_guess() -> None:
    assert versions(["no-such-package-at-all"]) == {"no-such-package-at-all": None}


def test_the_machine_is_described() -> None:
    here = Hardware.here()
    assert here.cores >= 1
    assert here.processor
    assert here.memory_bytes is None or here.memory_bytes > 1 << 28


def test_torch_is_not_imported() -> None:
    code = (
        "import halfbyte.govern.manifest, halfbyte.govern.run_folder, sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
