"""Promises of starting up: quick, light, and the same for the module and the command."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import halfbyte

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "tokenizers")
# Half a second is where a person begins to wait; CPU time is taken, since others use the machine too.
HELP_CPU_SECONDS = 0.5


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def _imported_by(code: str) -> set[str]:
    done = _python("-c", f"{code}\nimport sys; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = _imported_by("import halfbyte; dir(halfbyte); halfbyte.__version__")
    assert "halfbyte" in loaded
    assert not loaded & {*HEAVY, "typer", "rich", "pydantic"}


@pytest.mark.parametrize("verb", ["", "run", "train", "eval", "quantize", "doctor", "data", "config"])
def test_help_loads_nothing_heavy(verb: str) -> None:
    code = (
        "from halfbyte.cli.app import call\n"
        f"try: call({[*([verb] if verb else []), '--help']!r})\n"
        "except SystemExit as leave: assert leave.code == 0"
    )
    assert not _imported_by(code) & set(HEAVY)


def test_the_imports_would_be_seen() -> None:
    assert "torch" in _imported_by("import halfbyte; halfbyte.load")


def test_help_answers_at_once() -> None:
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Usage" in _python("-m", "halfbyte", "--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < HELP_CPU_SECONDS


def test_the_version_is_the_packages() -> None:
    assert _python("-m", "halfbyte", "--version").stdout == f"halfbyte {halfbyte.__version__}\n"


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ("", {}, "2000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import torch; ", {}, "None"),  # read already: a value set now would be a lie
    ],
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(
    before: str, given: dict[str, str], expected: str
) -> None:
    code = f"{before}import halfbyte, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
