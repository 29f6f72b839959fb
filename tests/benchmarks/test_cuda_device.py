"""What the benchmarks do on a GPU, without one: the host side of the timer and the bounds, and the programs end to end.

The GPU is pretended: whatever goes to "cuda" stays on the CPU.
"""

import ctypes
import sys
import time
from types import SimpleNamespace

import bench_adder
import bench_distill
import bench_int8
import pytest
import torch
from harness import cuda_device, gpu_day_kernels, report
from torch.overrides import TorchFunctionMode

HOPPER = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 10, total_memory=1 << 30
)


class Here(TorchFunctionMode):
    """Every "cuda" is the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * max(end.at - self.at, 1e-9)


class Driver:
    """libcuda.so.1, as far as it is asked."""

    status = 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert (attribute, device) == (13, 0)
        ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = 1_980_000
        return self.status


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, and the list of what the device was made to do."""
    done = []
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda *_: HOPPER,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 24,
        "reset_peak_memory_stats": lambda *_: None,
        "_sleep": lambda cycles: done.append(cycles),
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *a: Driver() if name == "libcuda.so.1" else load(name, *a))
    monkeypatch.setattr(cuda_device, "describe", lambda: {"CUDA kernels": "for 9.0"})
    monkeypatch.setattr(cuda_device, "SAMPLE", 1e-6)
    settings = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    cuda_device._flush_buffer.cache_clear()
    with Here():
        yield done
    cuda_device._flush_buffer.cache_clear()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = settings


def test_clock_and_bounds(gpu, monkeypatch):
    assert cuda_device.description()["clock_mhz"] == 1980
    bounds = cuda_device.bounds(torch.float32)
    assert bounds["forward"] == 64 * 132 * 1.98e9  # terms per clock x multiprocessors x clock
    assert bounds["step"] == pytest.approx(3 / (1 / 64 + 1 / 64 + 1 / 128) * 132 * 1.98e9)
    monkeypatch.setattr(Driver, "status", 100)
    with pytest.raises(SystemExit, match="does not tell the clock of the GPU .error 100"):
        cuda_device.description()


def test_every_call_has_a_head_start(gpu):
    measure = cuda_device.device_clock(lambda: gpu.append("call"), 7)
    assert gpu == ["call"]  # not timed
    assert measure(2) > 0 and gpu == ["call", 7, "call", 7, "call"]


def test_bench_adder(gpu, tiny, tmp_path, monkeypatch):
    file, seen = tmp_path / "r.csv", []
    real = torch.nn.functional.conv2d

    def conv2d(*args, **kwargs):
        seen.append(torch.backends.cudnn.allow_tf32)
        return real(*args, **kwargs)

    monkeypatch.setattr(bench_adder.F, "conv2d", conv2d)
    bench_adder.main(["--device", "cuda", "--threads", "1", "--seconds", "0.1", "--csv", str(file)], tiny[:1])
    about, rows = report.read_csv(file)
    assert about["device"] == "H200" and about["compute_capability"] == "9.0"
    assert {True, False} == set(seen) and torch.backends.cudnn.allow_tf32 is False
    assert {row["contestant"] for row in rows} == {"adder", "conv2d", "conv2d_tf32", "cdist", "eager"}
    assert {"mean: step_over_conv2d_tf32", "mean: forward_share_of_limit"} <= set(about)
    assert [row["extra_bytes"] for row in rows if row["pass"] == "memory"]


@pytest.mark.slow
def test_bench_int8(gpu, tiny, tmp_path, monkeypatch):
    file, real = tmp_path / "r.csv", bench_int8.convert

    def convert(*arguments):
        with monkeypatch.context() as patch:  # torch.export looks for the state of a GPU
            patch.setattr(torch.cuda, "is_available", lambda: False)
            return real(*arguments)

    monkeypatch.setattr(bench_int8, "convert", convert)
    options = ["--device", "cuda", "--threads", "1", "--batch", "2", "--seconds", "0.1", "--csv", str(file)]
    result = bench_int8.main(options, tiny[:1])
    wanted = {"over_conv2d", "over_conv2d_float16", "resnet20_over_cnn_float16", "resnet20_over_adder_float32"}
    assert wanted <= set(result["geomean"])
    assert {cuda_device.HEAD_START, cuda_device.OF_A_NETWORK} <= set(gpu)


def test_bench_distill(gpu, tmp_path, monkeypatch, capsys):
    file = tmp_path / "r.csv"
    options = ["--device", "cuda", "--threads", "1", "--networks", "lenet5", "--batch", "2", "--seconds", "0.1"]
    monkeypatch.setattr(bench_distill, "take_turns", lambda c, *_, **__: {x.name: x.measure(1) for x in c} and times(c))
    monkeypatch.setattr(sys, "argv", ["bench_distill.py", *options, "--csv", str(file)])
    bench_distill.main()
    about, rows = report.read_csv(file)
    assert about["device"] == "H200" and len(rows) == 9
    monkeypatch.setattr(sys, "argv", ["bench_distill.py", "--cuda-graph"])
    with pytest.raises(SystemExit):
        bench_distill.main()
    assert "--cuda-graph: expected --device cuda, got cpu" in capsys.readouterr().err


def times(contestants):
    return {c.name: SimpleNamespace(seconds=1.0, spread=0.0) for c in contestants}


def test_the_calls_of_the_counters(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day_kernels, "SIDE", 4)
    monkeypatch.setattr(gpu_day_kernels, "N", 1)
    monkeypatch.setattr(sys, "argv", ["gpu_day_kernels.py", "--device", "cuda"])
    gpu_day_kernels.main()
    assert len(capsys.readouterr().out.splitlines()) == len(gpu_day_kernels.MEASURED)
