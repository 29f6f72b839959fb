"""A CUDA device in a benchmark: its description, an upper bound of the arithmetic, a timer, peak memory.

The bound is a model, not a measurement: terms per clock and multiprocessor (TERMS, derived from the instructions of the
inner loops and the throughput of the units that execute them) x multiprocessors x the highest clock.  A device that is
hot or power-limited runs below that clock, and so below the bound.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch

from adderops.functional import adder_conv2d
from adderops.info import describe
from harness.layers import Layer

# Terms per clock and multiprocessor by compute capability; a device that is not listed has no bound.
#   forward, float32: a minimum and an addition on separate units with 64 float lanes (7.5, 8.0), else two additions
#   forward, 16-bit: packed minima, summed by the tensor cores (from 8.0 on)
#   grad_x: FADD.SAT and FFMA; grad_w: FFMA; both compute 16-bit floats in float32
_FLOAT32 = {
    "forward": {(7, 5): 64, (8, 0): 64, (8, 6): 64, (8, 9): 64, (9, 0): 64, (10, 0): 64, (12, 0): 64},
    "grad_x": {(7, 5): 32, (8, 0): 32, (8, 6): 64, (8, 9): 64, (9, 0): 64, (10, 0): 64, (12, 0): 64},
    "grad_w": {(7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128, (10, 0): 128, (12, 0): 128},
}
_HALVES = _FLOAT32 | {
    "forward": {(7, 5): 64, (8, 0): 128, (8, 6): 64, (8, 9): 64, (9, 0): 128, (10, 0): 128, (12, 0): 64}
}
TERMS = {torch.float32: _FLOAT32, torch.float16: _HALVES, torch.bfloat16: _HALVES}


def require() -> None:
    """Ends the program if there are no CUDA kernels or no GPU."""
    kernels = describe()["CUDA kernels"]
    if kernels.startswith("none"):
        raise SystemExit(f"--device cuda: adderops has no CUDA kernels ({kernels.removeprefix('none: ')})")
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: no GPU to run on (torch.cuda.is_available() is False)")


def highest_clock() -> int:
    """Hz of the multiprocessors, from the driver: CUDA 13 has no clock among the properties that torch hands out."""
    driver, kilohertz = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    attribute_clock_rate = 13  # CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    status = driver.cuInit(0) or driver.cuDeviceGetAttribute(
        ctypes.byref(kilohertz), attribute_clock_rate, torch.cuda.current_device()
    )
    if status:
        raise SystemExit(f"--device cuda: the driver does not tell the clock of the GPU (error {status})")
    return kilohertz.value * 1000


def description() -> dict[str, str | int | None]:
    device = torch.cuda.get_device_properties()
    return {
        "device": device.name,
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "clock_mhz": highest_clock() // 10**6,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def bounds(dtype: torch.dtype) -> dict[str, float]:
    """{pass: maximum terms per second}, including a whole step; empty for a device that is not in the model."""
    device = torch.cuda.get_device_properties()
    capability = device.major, device.minor
    rates = {
        name: terms[capability] * device.multi_processor_count * highest_clock()
        for name, terms in TERMS[dtype].items()
        if capability in terms
    }
    if rates:
        rates["step"] = len(rates) / sum(1 / rate for rate in rates.values())  # the three passes in sequence
    return rates


# Clocks of the device that a call has for its queueing: some 0.3 ms, more than a backward pass of one layer takes, and
# some 5 ms.
HEAD_START, OF_A_NETWORK = 500_000, 10_000_000
# Seconds of device work per sample (timing.py): events resolve microseconds, and each call is preceded by a wait.
SAMPLE = 0.001


@cache
def _flush_buffer() -> torch.Tensor:
    """Twice the L2 cache."""
    size = 2 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def device_clock(call: Callable[[], object], head_start: int = HEAD_START) -> Callable[[int], float]:
    """Measures a call that queues device work: events before and after it, the L2 cache flushed each time.

    The device waits before each call, so that the host has queued all of it before the first kernel starts: else a
    small layer's time would be that of Python.  A first call, which loads kernels and lets cuDNN choose, is not timed.
    """
    call()

    def measure(repeats: int) -> float:
        buffer = _flush_buffer()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            buffer.zero_()
            torch.cuda._sleep(head_start)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3

    return measure


def extra_memory(layers: Sequence[Layer], dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """{layer name: (extra bytes, allowed bytes)} of a step, as in memory.py, from the allocator's statistics."""
    result = {}
    for layer in layers:
        worst = 0
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x, w, grad_y = (t.to("cuda", dtype) for t in layer.tensors(memory_format))
            x.requires_grad_(), w.requires_grad_()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            y = adder_conv2d(x, w, stride=layer.stride, padding=layer.padding)
            y.backward(grad_y)
            worst = max(worst, torch.cuda.max_memory_allocated() - before - y.nbytes)
            allowed = x.nbytes + w.nbytes + y.nbytes + 64 * 2**20
            del x, w, grad_y, y
        result[layer.name] = worst, allowed
    return result
