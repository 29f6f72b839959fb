"""The kernels compile without torch and agree with the definition: here, for AArch64, and on any architecture."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEST = "tests/ops/native/kernels_against_definition.cpp"
KERNELS = [
    "csrc/cpu/select.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp")),
]
GENERIC = ["tests/ops/native/kernels_generic.cpp", "csrc/cpu/kernels_definition.cpp"]


def compile_and_run(compiler: list[str], runner: list[str], program: Path, kernels: list[str]) -> str:
    command = [*compiler, "-std=c++17", "-O1", "-Icsrc", TEST, *kernels, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([*runner, str(program), "60"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def host_compiler() -> str:
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    return compiler


@pytest.mark.slow
def test_kernels_need_no_torch(tmp_path):
    assert "60 cases, 0 failed" in compile_and_run([host_compiler()], [], tmp_path / "native", KERNELS)


@pytest.mark.slow
def test_generic_kernels(tmp_path):
    output = compile_and_run([host_compiler()], [], tmp_path / "generic", GENERIC)
    assert output == "generic : 60 cases, 0 failed\n"


@pytest.mark.slow
@pytest.mark.parametrize("header", sorted((ROOT / "csrc/cpu/kernels").glob("*.h")), ids=lambda path: path.name)
def test_a_kernel_header_includes_what_it_uses(header):
    subprocess.run([host_compiler(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-w", str(header)], check=True)


@pytest.mark.slow
def test_neon_under_an_emulator(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    runner = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not runner:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    assert compile_and_run([compiler, "-static"], [runner], tmp_path / "neon", KERNELS).startswith("neon :")
