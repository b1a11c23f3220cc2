"""The compiled kernels under the address and undefined-behaviour sanitizers, and what their objects may contain."""

from __future__ import annotations

import platform
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
PLAIN_SOURCES = (
    *(
        "attention_backward",
        "attention_forward",
        "attention_tiles",
        "backward",
        "dispatch",
        "forward",
        "loss",
    ),
    *("parallel", "portable"),
)
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compile_objects(folder: Path, *flags: str) -> dict[str, Path]:
    assert COMPILER, "a C++ compiler is needed, as for the installation"
    define = "-DHALFBYTE_X86" if X86 else "-DHALFBYTE_ARM64"
    sources = {name: [] for name in PLAIN_SOURCES} | INSTRUCTION_SETS
    running, objects = [], {}
    for name, own in sources.items():
        objects[name] = folder / f"{name}.o"
        command = [COMPILER, "-std=c++20", "-ffp-contract=off", define, *own, *flags]
        running.append(subprocess.Popen([*command, "-c", NATIVE / f"{name}.cpp", "-o", objects[name]]))
    assert [process.wait() for process in running] == [0] * len(running)
    return objects


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    objects = compile_objects(folder, "-O1", "-g", *SANITIZE)
    program = folder / "kernel_grid"
    source = Path(__file__).with_name("kernel_grid.cpp")
    command = [COMPILER, "-std=c++20", "-O1", "-g", *SANITIZE, source, *objects.values(), "-o", program]
    subprocess.run([*command, "-lpthread", "-ldl"], check=True)
    return program


def test_kernels_run_clean_under_address_and_undefined_behaviour_sanitizers(sanitized):
    ran = subprocess.run([sanitized], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "portable: 0 differences" in ran.stdout
    assert ran.stderr == ""


def test_the_sanitizer_notices_a_planted_overrun(sanitized):
    ran = subprocess.run([sanitized, "--overrun"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr


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
def test_neon_kernels_agree_under_emulation(tmp_path):
    sources = [NATIVE / f"{name}.cpp" for name in (*PLAIN_SOURCES, "neon")]
    grid = Path(__file__).with_name("kernel_grid.cpp")
    command = [
        "aarch64-linux-gnu-g++",
        "-std=c++20",
        "-O2",
        "-ffp-contract=off",
        "-DHALFBYTE_ARM64",
        "-static",
    ]
    command += [*map(str, sources), str(grid), "-o", str(tmp_path / "grid"), "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    ran = subprocess.run(
        ["qemu-aarch64-static", tmp_path / "grid"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "neon: 0 differences" in ran.stdout
