"""Hostile calls of every operator end in an answer, or in a Python exception that names the operator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CALLS = int(os.environ.get("ADDEROPS_HOSTILE_CALLS", "500"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the process by what /proc tells of it")
def test_hostile_calls():
    command = [sys.executable, str(HERE / "hostile_calls.py"), "--calls", str(CALLS), "--seed", "1"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}  # cases.py
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300 + CALLS)
    print(done.stdout)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    assert f"{CALLS} calls: " in done.stdout and "answered" in done.stdout
