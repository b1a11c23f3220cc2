"""The compiled kernels under the address and undefined-behaviour sanitizers, and what their objects may contain."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
X86 = platform.machine().lower() in {"x86_64", "amd64"}
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2"]
INSTRUCTION_SETS = (
    {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
    if X86
    else {"neon": []}
)
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SHARED = (
    *("adamw", "attention_backward", "attention_forward", "attention_tiles", "backward", "dispatch"),
    *("elementwise", "forward", "loss", "parallel", "portable"),
)
GRIDS = ("kernel_grid", "elementwise_grid", "adamw_grid")
FLAGS = ["-std=c++20", "-ffp-contract=off"]
DEBUG = ["-O0", "-g1"]  # optimising with sanitizers takes minutes
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compile_objects(folder: Path, *flags: str) -> dict[str, Path]:
    assert COMPILER, "a C++ compiler is needed, as for the installation"
    define = "-DHALFBYTE_X86" if X86 else "-DHALFBYTE_ARM64"
    sources = {name: [] for name in SHARED} | INSTRUCTION_SETS
    running, objects = [], {}
    for name, own in sources.items():
        objects[name] = folder / f"{name}.o"
        command = [COMPILER, *FLAGS, define, *own, *flags]
        running.append(subprocess.Popen([*command, "-c", NATIVE / f"{name}.cpp", "-o", objects[name]]))
    assert [process.wait() for process in running] == [0] * len(running)
    return objects


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    objects = compile_objects(folder, *DEBUG, *SANITIZE)
    for grid in GRIDS:
        source = Path(__file__).with_name(f"{grid}.cpp")
        command = [
            COMPILER,
            "-std=c++20",
            "-O1",
            "-g",
            *SANITIZE,
            source,
            *objects.values(),
            "-o",
            folder / grid,
        ]
        subprocess.run([*command, "-lpthread", "-ldl"], check=True)
    return folder


@pytest.mark.parametrize("grid", GRIDS)
def test_kernels_run_clean_under_address_and_undefined_behaviour_sanitizers(sanitized, grid):
    ran = subprocess.run([sanitized / grid], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "portable: 0 differences" in ran.stdout
    assert ran.stderr == ""


def test_the_sanitizer_notices_a_planted_overrun(sanitized):
    ran = subprocess.run(
        [sanitized / "kernel_grid", "--overrun"], capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr


# Largest errors in units of 2^-24 of the true value, beyond what grows with the argument; native/vector_math.hpp
# derives them. A sample of all floats, each 257th bit pattern.
VECTOR_MATH = {"exp": 1.5, "sigmoid": 3.0, "tanh": 2.5, "normal.cumulative": 9.0, "normal.density": 2.0}
LIMITS = {
    "exp": "0 inf",
    "sigmoid": "0 1",
    "tanh": "-1 1",
    "normal.cumulative": "0 1",
    "normal.density": "0 0",
}


def vector_math(folder: Path, source: Path) -> dict[str, tuple[float, str, str]]:
    """Largest error, limits at both infinities and whether NaN stays, of each function."""
    assert COMPILER, "a C++ compiler is needed, as for the installation"
    program = folder / "vector_math"
    subprocess.run([COMPILER, *FLAGS, "-O2", source, "-o", program], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\S+) (\S+) at \S+, limits (.+), nan (\d)$", printed, re.MULTILINE)
    return {name: (float(worst), limits, nan) for name, worst, limits, nan in found}


def test_vector_functions_keep_their_error_bounds_and_limits(tmp_path):
    found = vector_math(tmp_path, Path(__file__).with_name("vector_math.cpp"))
    assert {name: (limits, nan) for name, (_, limits, nan) in found.items()} == {
        name: (limits, "1") for name, limits in LIMITS.items()
    }
    assert {name: worst for name, (worst, _, _) in found.items() if not worst <= VECTOR_MATH[name]} == {}


def test_the_error_bounds_notice_a_coefficient_that_is_a_little_off(tmp_path):
    header = (NATIVE / "vector_math.hpp").read_text(encoding="utf-8")
    assert header.count("8.368745e-3f") == 1
    for name in ("kernels", "portable"):
        shutil.copy(NATIVE / f"{name}.hpp", tmp_path)
    (tmp_path / "vector_math.hpp").write_text(header.replace("8.368745e-3f", "8.4e-3f"), encoding="utf-8")
    source = tmp_path / "vector_math.cpp"
    text = Path(__file__).with_name("vector_math.cpp").read_text(encoding="utf-8")
    source.write_text(text.replace("../../native/vector_math.hpp", "vector_math.hpp"), encoding="utf-8")
    found = vector_math(tmp_path, source)
    assert found["exp"][0] > VECTOR_MATH["exp"]
    assert found["sigmoid"][0] > VECTOR_MATH["sigmoid"]


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
@pytest.mark.parametrize("optimisation", ["-O0", "-O3"])
def test_no_symbol_of_an_instruction_set_can_replace_another_file_s(tmp_path, optimisation):
    objects = compile_objects(tmp_path, optimisation)
    for name in INSTRUCTION_SETS:
        listing = subprocess.run(
            ["nm", "-C", objects[name]], capture_output=True, text=True, check=True
        ).stdout
        shared = [
            line for line in listing.splitlines() if (line.split()[-2:-1] and " W " in line) or " V " in line
        ]
        shared = [line for line in shared if "DW.ref" not in line]
        assert shared == [], f"{name} defines symbols that the linker may merge"
        assert "kernels()" in listing


@pytest.mark.skipif(
    X86 is False or not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64-static")),
    reason="needs the AArch64 cross compiler and emulator (Debian: g++-aarch64-linux-gnu qemu-user-static)",
)
@pytest.mark.parametrize("grid", GRIDS)
def test_neon_kernels_agree_under_emulation(tmp_path, grid):
    sources = [NATIVE / f"{name}.cpp" for name in (*SHARED, "neon")] + [
        Path(__file__).with_name(f"{grid}.cpp")
    ]
    command = ["aarch64-linux-gnu-g++", *FLAGS, "-O2", "-DHALFBYTE_ARM64", "-static"]
    command += [*map(str, sources), "-o", str(tmp_path / "grid"), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    ran = subprocess.run(
        ["qemu-aarch64-static", tmp_path / "grid"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "neon: 0 differences" in ran.stdout
