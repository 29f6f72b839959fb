"""The other files of this folder skip as a whole without a GPU: here they are collected as if there were one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PRETEND = """
import sys, pytest, torch
from adderops import _ops
torch.cuda.is_available = lambda: True
_ops.CUDA_KERNELS_MISSING = None
sys.exit(pytest.main(["--collect-only", "-q", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_every_gpu_test_is_collected():
    """Fails where a test module that they import, or a name in it, has moved."""
    files = [str(path) for path in (TESTS / "gpu").glob("test_*.py") if path != Path(__file__).resolve()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))}
    command = [sys.executable, "-c", PRETEND, *files]
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    for wanted in (
        *("test_conv2d_exact_", "test_elements_", "test_conv2d.py::test_cuda_graph"),
        *("test_int8.py::", "test_moments.py::", "test_integrate_and_fire.py::", "test_distill.py::"),
    ):
        assert wanted in run.stdout, wanted
