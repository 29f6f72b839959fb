"""Hostile calls of every operator end in a result, or in a Python exception that names the operator."""

import os
import sys
from pathlib import Path

import pytest
from child import run_python

SCRIPT = Path(__file__).with_name("hostile_calls.py")
CALLS = int(os.environ.get("ADDEROPS_HOSTILE_CALLS", "500"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to limit the memory of the process")
def test_hostile_calls():
    done = run_python(str(SCRIPT), "--calls", str(CALLS), "--seed", "1", timeout=300 + CALLS)
    print(done.stdout)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    assert f"{CALLS} calls: " in done.stdout and "answered" in done.stdout
