"""Memory: the extra memory of a training step, and no kernel reads outside its operands."""

import mmap
import os
import signal
import sys

import pytest
from child import run_python

ROOM = 64 << 20

# name, x, (C_out, k), stride, padding: real layers, including the largest input, weight and output of their networks.
LAYERS = [
    ("resnet20-16", (128, 16, 32, 32), (16, 3), 1, 1),
    ("resnet20-64", (128, 64, 8, 8), (64, 3), 1, 1),
    ("resnet18-stem", (4, 3, 224, 224), (64, 7), 2, 3),
    ("resnet18-64", (8, 64, 56, 56), (64, 3), 1, 1),
    ("resnet18-512", (8, 512, 7, 7), (512, 3), 1, 1),
    ("resnet50-1x1-out", (4, 64, 56, 56), (256, 1), 1, 0),
    ("resnet50-1x1-s2", (4, 1024, 14, 14), (2048, 1), 2, 0),
    ("one-long-row", (1, 64, 1, 60000), (32, 3), 1, 1),
]
QUICK = ("resnet18-512", "one-long-row")  # those not marked slow

STEP = """
import re, sys
import torch
from adderops.functional import adder_conv2d

def resident(which):
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

torch.set_num_threads(2)
channels_last = {channels_last}
# starts threads, loads code and creates allocator arenas before the measurement
adder_conv2d(torch.ones(2, 3, 5, 5, requires_grad=True), torch.ones(2, 3, 3, 3, requires_grad=True)).sum().backward()
x, w = torch.randn({x}, requires_grad=True), torch.randn({w}, requires_grad=True)
if channels_last:
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
with torch.no_grad():
    grad_y = torch.nn.functional.conv2d(x[:1], w, None, {stride}, {padding})
    grad_y = torch.randn(len(x), *grad_y.shape[1:])
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = resident("VmRSS")
y = adder_conv2d(x, w, None, {stride}, {padding})
y.backward(grad_y)
assert x.grad.shape == x.shape and w.grad.shape == w.shape
print(resident("VmHWM") - before, 4 * (x.numel() + w.numel() + y.numel()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc/self/clear_refs to reset the peak with"
)
@pytest.mark.parametrize(
    "channels_last", (False, pytest.param(True, marks=pytest.mark.slow)), ids=("contiguous", "channels_last")
)
@pytest.mark.parametrize(
    "name, x, filters, stride, padding",
    [pytest.param(*layer, id=layer[0], marks=() if layer[0] in QUICK else pytest.mark.slow) for layer in LAYERS],
)
def test_extra_memory_of_a_step(name, x, filters, stride, padding, channels_last):
    """Forward and backward together stay below input + output + weights + 64 MiB, y and both gradients included."""
    w = (filters[0], x[1], filters[1], filters[1])
    done = run_python("-c", STEP.format(x=x, w=w, stride=stride, padding=padding, channels_last=channels_last))
    assert done.returncode == 0, done.stderr
    extra, tensors = map(int, done.stdout.split())
    print(f"{name}: {extra / 2**20:.1f} MiB, of which results {tensors / 2**20:.1f}")
    assert extra < tensors + ROOM, f"{name}: {extra / 2**20:.1f} MiB, allowed {(tensors + ROOM) / 2**20:.1f}"


GUARDED = """
import ctypes, mmap
import torch
torch.set_num_threads(1)
from cases import FORMATS, PASSES, Inputs, compute, exact_inputs, random_case, SELECTED, CASES

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
keep = []

def guarded(t, end):
    # a copy of t in its storage order, flush against an inaccessible page behind it or in front of it
    order = sorted(range(t.dim()), key=lambda d: -t.stride(d))
    dense = t.permute(order).contiguous()
    size = dense.numel() * dense.element_size()
    pages = -(-size // PAGE)
    block = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for page in (0, pages + 1):
        assert libc.mprotect(base + page * PAGE, PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - size if end else 0)
    flat = torch.frombuffer(block, dtype=t.dtype, count=dense.numel(), offset=offset)
    view = flat.view(dense.shape).copy_(dense).permute([order.index(d) for d in range(t.dim())])
    keep.append(block)
    return view

for c in {cases}:
    for dtype in (torch.float32, torch.bfloat16):
        i = exact_inputs(c).to(dtype)
        for how in FORMATS.values():
            for end in (True, False):
                keep.clear()
                g = Inputs(*(guarded(how(t), end) for t in (i.x, i.w, i.grad_y)), guarded(i.bias, end))
                for name in PASSES:
                    print(name, c, dtype, "end" if end else "start", g.x.stride(), flush=True)
                    got = compute(name, c, g)
                    assert torch.equal(got, compute(name, c, i)), "wrong"
{touch}
print("done")
"""


@pytest.mark.skipif(not hasattr(mmap, "PAGESIZE") or not sys.platform.startswith("linux"), reason="needs mprotect")
@pytest.mark.parametrize(
    "cases",
    (
        pytest.param("[random_case(s) for s in range(30)]", id="random"),
        pytest.param("SELECTED", id="selected", marks=pytest.mark.slow),
        pytest.param("CASES[:42]", id="edges", marks=pytest.mark.slow),
    ),
)
def test_no_read_outside_the_operands(cases, backend):
    """Every operand is flush against an inaccessible page: a read one byte outside kills the process."""
    done = run_python("-c", GUARDED.format(cases=cases, touch=""))
    last = (done.stdout.splitlines() or ["nothing"])[-1]
    assert done.returncode == 0 and last == "done", f"exit {done.returncode} after {last}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_guard_pages_guard():
    """The test above can fail: reading one byte behind a guarded tensor does kill the process."""
    touch = "x = guarded(torch.ones(1, 1, 3, 5), True); ctypes.string_at(x.data_ptr() + 60, 1)"
    assert run_python("-c", GUARDED.format(cases="[]", touch=touch)).returncode == -signal.SIGSEGV


THREADS = """
import re, threading
import torch
from adderops.functional import adder_conv2d

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) / 1024

torch.set_num_threads(2)
x, w = torch.randn(1, 512, 7, 7), torch.randn(512, 512, 3, 3)  # 9 MiB of packed weights per call
want = adder_conv2d(x, w)
before, wrong, done = resident(), [], threading.Barrier(41)

def work():
    if not torch.equal(adder_conv2d(x, w), want):
        wrong.append(1)
    done.wait()   # every thread has made its call
    done.wait()   # and none has ended

threads = [threading.Thread(target=work) for _ in range(40)]
for thread in threads:
    thread.start()
done.wait()
print(resident() - before, len(wrong))
done.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc/self/status to read the memory from")
def test_calling_threads_keep_no_memory_each():
    """The process, not each calling thread, keeps memory for later calls: at most 32 MiB per torch thread."""
    done = run_python("-c", THREADS)
    assert done.returncode == 0, done.stderr
    kept, wrong = done.stdout.split()
    print(f"{float(kept):.1f} MiB for 40 threads")
    assert int(wrong) == 0 and float(kept) < 2 * 32 + 40
