"""Peak extra memory of a training step of the adder convolution: the resident set of a separate process.

    python memory.py THREADS < LAYERS.json

reads a list of the fields of `layers.Layer` and writes {layer name: [extra bytes, allowed bytes]}.  Extra memory is the
peak resident set during forward and backward, minus what was resident before (PyTorch loaded, thread pool running),
minus x, w and y.  It includes the gradients of all three and whatever an operator keeps between calls.  Allowed is
x + w + y + 64 MiB.  Needs Linux: /proc/self/clear_refs resets the peak that /proc/self/status reports.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from harness.layers import Layer

ALLOWANCE = 64 * 2**20


def extra_memory(layers: Sequence[Layer], threads: int) -> dict[str, tuple[int, int]] | str:
    """{layer name: (extra bytes, allowed bytes)}, the larger of both memory formats; or why it cannot be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return "the peak resident set can be reset on Linux only"
    child = subprocess.run(
        [sys.executable, __file__, str(threads)],
        input=json.dumps([asdict(layer) for layer in layers]),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if child.returncode:
        return f"the measuring process failed: {child.stderr.strip().splitlines()[-1:]}"
    return {name: tuple(values) for name, values in json.loads(child.stdout).items()}


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _release_and_reset() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # free pages that the allocator keeps would hide new ones
    Path("/proc/self/clear_refs").write_text("5")


def _step(layer: Layer, memory_format: torch.memory_format) -> int:
    """Peak bytes of a step, minus x, w and y."""
    from adderops.functional import adder_conv2d

    x, w, _ = layer.tensors(memory_format)
    x.requires_grad_()
    w.requires_grad_()
    _release_and_reset()
    y = adder_conv2d(x, w, stride=layer.stride, padding=layer.padding)
    y.backward(torch.ones_like(y))
    return _status("VmHWM") - sum(t.nbytes for t in (x, w, y))


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    layers = [Layer(**fields) for fields in json.load(sys.stdin)]
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format in formats:  # starts the thread pool, loads code, initializes autograd
        _step(Layer("warm-up", 2, 16, 16, 8, 3), memory_format)
    _release_and_reset()
    resident = _status("VmRSS")
    result = {}
    for layer in layers:
        x, w, y = layer.tensors()
        allowed = x.nbytes + w.nbytes + y.nbytes + ALLOWANCE
        del x, w, y
        result[layer.name] = (max(_step(layer, f) for f in formats) - resident, allowed)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
