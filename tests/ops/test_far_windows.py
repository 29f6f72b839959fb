"""Padding, dilation and stride up to 2^30 on tiny tensors: correct, with little time and memory, as in `F.conv2d`."""

import os

import pytest
import torch
import torch.nn.functional as F
from cases import FAR_CASES, FORMATS, PASSES, assert_same, compute, exact_inputs, exact_result, near
from child import run_python

from adderops.functional import adder_conv2d, adder_conv2d_int8
from ops.test_int8 import OP, OUTPUTS, expected, inputs

PAIRS = [pytest.param(far, near(far, geometry), id=far.name) for far, geometry in FAR_CASES]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("far, close", PAIRS)
def test_sums_equal_those_of_near_windows(far, close, name, dtype, backend):
    for how in FORMATS.values():
        arranged = exact_inputs(close).to(dtype).arranged(how)
        assert_same(compute(name, far, arranged), exact_result(name, close).to(dtype), f"{name} of {far!r}")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("far, close", PAIRS)
def test_int8_equals_that_of_near_windows(far, close, output, backend):
    b = inputs(close)
    for seed in range(4):
        got = OP(b.x, b.w, *b.epilogue(output, seed), *far.geometry)
        assert_same(got, expected(close, output, seed), f"{output} of {far!r}")


def test_the_functions_accept_what_conv2d_accepts():
    x, w, big = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3), (2**30, 2**30 - 1)
    y = adder_conv2d(x, w, padding=big, dilation=big)
    assert y.shape == F.conv2d(x, w, padding=big, dilation=big).shape and y.item() == -8
    y = adder_conv2d_int8(x.byte(), w.byte(), padding=big, dilation=big, padding_value=3)
    assert y.item() == -16


FRUGAL = """
import re, torch
from adderops.functional import adder_conv2d, adder_conv2d_int8

def resident():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) // 1024

before = resident()
for far in (2**12, 2**15, 2**21, 2**30):
    for size, groups in ((1, 1), (7, 1), (7, 32)):
        x, w = torch.ones(2, 32, size, size, requires_grad=True), torch.ones(32, 32 // groups, 3, 3, requires_grad=True)
        adder_conv2d(x, w, padding=far, dilation=far, groups=groups).sum().backward()
        adder_conv2d_int8(x.detach().byte(), w.detach().byte(), padding=far, dilation=far, groups=groups)
        adder_conv2d(x, w, stride=far, padding=far, groups=groups).sum().backward()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status to read the peak from")
def test_time_and_memory_follow_the_taps():
    """Copies of these windows would take hundreds of MiB or more than any machine has."""
    done = run_python("-c", FRUGAL, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100, f"{done.stdout.strip()} MiB"
