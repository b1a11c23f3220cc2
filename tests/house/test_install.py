"""What a user meets who has no compiler that will do, or asks for none."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def install(tmp_path):
    """Installs the project into an empty environment with more environment variables; returns what pip did."""
    venv.create(tmp_path / "venv", with_pip=False)

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python", "install"]
        options = ["--no-deps", "-C", f"build-dir={tmp_path / 'build'}", str(ROOT)]
        environment = os.environ | variables
        return subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_a_failed_native_build_stops_with_the_compiler_s_message_and_the_remedy(install, tmp_path):
    compiler = tmp_path / "old-c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for a in "$@"; do case $a in -std=*20) echo "unrecognized option $a" >&2; exit 1;; esac; done\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    done = install(CXX=str(compiler))
    assert done.returncode != 0
    assert "unrecognized option -std=" in done.stdout + done.stderr
    assert "HALFBYTE_NATIVE=0 pip install" in done.stdout + done.stderr


def test_native_zero_installs_without_and_every_command_says_so(install, tmp_path):
    assert install(HALFBYTE_NATIVE="0", CXX="/bin/false").returncode == 0
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert not list(site.glob("halfbyte/_native*"))
    for arguments in (["doctor"], ["data", "check", str(tmp_path / "absent.jsonl")]):
        # The packages of this environment, but halfbyte from that one: the finder of an editable install comes first.
        code = (
            "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
            f"sys.path.insert(0, {str(site)!r}); from halfbyte.cli import main; main()"
        )
        command = [sys.executable, "-c", code, *arguments]
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        ran = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
        assert "Native kernels are not installed" in ran.stderr, (arguments, ran.stdout, ran.stderr)
