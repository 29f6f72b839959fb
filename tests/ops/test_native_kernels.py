"""The kernels compile and are right without torch: by the C++ compiler here, and for AArch64 where tools for it are."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    "tests/ops/native/kernels_against_definition.cpp",
    "csrc/cpu/select.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("kernels_*.cpp")),
]


def compile_and_run(compiler: list[str], runner: list[str], program: Path) -> str:
    command = [*compiler, "-std=c++17", "-O1", "-Icsrc", *SOURCES, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([*runner, str(program), "60"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_kernels_need_no_torch(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    assert "60 cases, 0 failed" in compile_and_run([compiler], [], tmp_path / "native")


@pytest.mark.slow
def test_neon_under_an_emulator(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    runner = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not runner:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)")
    assert compile_and_run([compiler, "-static"], [runner], tmp_path / "neon").startswith("neon :")
