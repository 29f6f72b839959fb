"""All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .host_kernels import C_TARGET, built

ROOT = Path(__file__).parents[2]
FLAGS = "-std=c99 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def sanitized(folder: Path, epilogue: str, target: str) -> subprocess.CompletedProcess:
    """Runs all kernels compiled with both sanitizers."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on Linux")
    finish = {"float32": "finish_float.c", "integer": "finish_integer.c"}[epilogue]
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("needs libasan of gcc")
    path = built(folder, "gcc", f"{FLAGS} {target}", finish)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "edge.sanitized_kernels", str(path), epilogue]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", ["float32", "integer"])
@pytest.mark.parametrize("target", [C_TARGET, ""], ids=["C", "chosen"])
def test_kernels(tmp_path, epilogue, target):
    done = sanitized(tmp_path, epilogue, target)
    assert done.returncode == 0, done.stderr[:3000]
    assert int(done.stdout) > 100
