"""CUDA without a GPU: the kernels, if they were built, load and register; tests/gpu runs them on a GPU."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import adderops
from adderops import _ops, info
from adderops.functional import adder_conv2d

CHECKOUT = Path(__file__).resolve().parents[2]
INSTALLED = Path(adderops.__file__).resolve().parent
OPERATORS = (
    *("adder_conv2d", "adder_conv2d_grad_x", "adder_conv2d_grad_w", "adder_conv2d_int8", "quantize"),
    "integrate_and_fire",
    *("_kernel_moments", "_kernel_moments_grad", "_mean_abs", "_match_rows"),
)

needs_kernels = pytest.mark.skipif(
    _ops.CUDA_KERNELS_MISSING is not None, reason=f"no CUDA kernels: {_ops.CUDA_KERNELS_MISSING}"
)


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda"])
def test_no_two_sources_share_an_object_file(folder):
    stems = Counter(path.stem for path in (CHECKOUT / folder).iterdir() if path.suffix in (".cpp", ".cu"))
    assert stems and set(stems.values()) == {1}, stems


@needs_kernels
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_operators_have_cuda_kernels(operator):
    assert "adderops._cuda" in sys.modules
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adderops::{operator}", "CUDA")


@needs_kernels
def test_the_library_knows_its_architectures():
    archs = _ops.cuda_archs()
    assert archs and info.describe()["CUDA kernels"] == f"for {archs.replace(';', ', ')}"
    cuobjdump = shutil.which("cuobjdump", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if not cuobjdump:
        pytest.skip("no cuobjdump to read the library with")
    library = sys.modules["adderops._cuda"].__file__
    listed = subprocess.run([cuobjdump, "--list-elf", "--list-ptx", library], capture_output=True, text=True).stdout
    machine_code = set(re.findall(r"\.sm_(\w+)\.cubin", listed))
    assert machine_code == {arch.replace(".", "").removesuffix("+PTX") for arch in archs.split(";")}
    ptx = {arch.replace(".", "").removesuffix("+PTX") for arch in archs.split(";") if arch.endswith("+PTX")}
    assert set(re.findall(r"\.sm_(\w+)\.ptx", listed)) == ptx


@needs_kernels
@pytest.mark.parametrize(
    "archs, codes",
    [
        # machine code runs on its own generation from its minor version on, PTX on everything later
        ("8.0", {75: 0, 80: 80, 86: 80, 89: 80, 90: 0}),
        (
            "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX",
            {70: 0, 75: 75, 80: 80, 87: 86, 89: 89, 90: 90, 103: 100, 110: 0, 121: 120},
        ),
        ("7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX", {120: 120, 130: 120}),
        ("7.5+PTX", {70: 0, 75: 75, 80: 75, 120: 75}),
        ("7.5+PTX;8.6+PTX;12.0", {75: 75, 80: 75, 86: 86, 90: 86, 120: 120, 121: 120}),
        ("9.0a;10.0a+PTX", {90: 90, 100: 100, 103: 0, 120: 0}),  # one capability only
    ],
)
def test_which_code_a_device_runs(archs, codes):
    assert {capability: _ops.cuda_code_for(archs, capability) for capability in codes} == codes


@needs_kernels
def test_the_devices_line_says_which_code_runs(monkeypatch):
    devices = [SimpleNamespace(name="A", major=8, minor=6), SimpleNamespace(name="B", major=7, minor=0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: devices[i])
    monkeypatch.setattr(_ops, "cuda_archs", lambda: "8.0")
    expected = "A (8.6, runs the kernels for 8.0), B (7.0, no kernels for it)"
    assert info.describe()["CUDA devices"] == expected
    monkeypatch.setattr(_ops, "CUDA_KERNELS_MISSING", "not built")
    assert info.describe()["CUDA devices"] == "A (8.6), B (7.0)"


@needs_kernels
def test_the_library_brings_its_own_runtime():
    """It needs only the current stream of torch's CUDA, so one build serves every torch; its runtime is hidden."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("no readelf")
    library = sys.modules["adderops._cuda"].__file__
    dynamic = subprocess.run([readelf, "-Wd", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\.so", dynamic)
    assert "libtorch_cpu" in needed and not [name for name in needed if "cuda" in name or name == "libtorch_python"]
    symbols = subprocess.run([readelf, "-W", "--dyn-syms", library], capture_output=True, text=True, check=True).stdout
    assert "PyInit__cuda" in symbols and not re.search(r"\bcudaLaunchKernel", symbols)
    of_others = re.findall(r" UND +(\w*cuda\w*)", symbols)
    assert set(of_others) == {"aoti_torch_device_type_cuda", "aoti_torch_get_current_cuda_stream"}


# --- tensors on a device that may not exist: fake tensors, which have a device but no data ---


def fake_cuda_tensors() -> tuple[torch.Tensor, torch.Tensor]:
    with FakeTensorMode():
        return torch.empty(2, 4, 5, 6, device="cuda"), torch.empty(8, 4, 3, 3, device="cuda")


@needs_kernels
def test_shapes_on_a_cuda_device():
    x, w = fake_cuda_tensors()
    if x.device.index is not None:
        assert adder_conv2d(x, w, padding=1).device == x.device
    y = adder_conv2d(x, w, padding=1)
    assert y.shape == (2, 8, 5, 6) and y.device.type == "cuda"


@pytest.mark.parametrize(
    "cause, says",
    [
        ("torch", "this torch is built without CUDA: install one"),
        ("library", "adderops was built without them: run `ADDEROPS_CUDA=1 pip install .`"),
        (
            "old",
            r"without them: install the CUDA toolkit 12 \(CUDA_HOME .*\), then run `ADDEROPS_CUDA=1 pip install .`",
        ),
        ("loading", r"_cuda.abi3.so does not load \(undefined symbol\): run `ADDEROPS_CUDA=1 pip install .`"),
    ],
)
def test_a_cuda_tensor_without_kernels(cause, says, monkeypatch):
    """The causes and the tensor are faked; the question and the answer are real."""
    monkeypatch.setattr(torch.version, "cuda", {"torch": None, "old": "12.8"}.get(cause, "13.0"))
    monkeypatch.setattr(_ops, "find_spec", lambda name: None if cause in ("library", "old") else name)
    if cause == "loading":

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "adderops._cuda":
                    raise ImportError("undefined symbol")

        monkeypatch.delitem(sys.modules, "adderops._cuda", raising=False)
        monkeypatch.delattr(adderops, "_cuda", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    missing = _ops._load_cuda_kernels()
    assert re.search(says, missing)
    monkeypatch.setattr(_ops, "CUDA_KERNELS_MISSING", missing)
    assert info.describe()["CUDA kernels"] == f"none: {missing}"
    x, w = fake_cuda_tensors()
    with pytest.raises(ValueError) as error:
        adder_conv2d(x, w)
    assert str(error.value) == (
        f"adder_conv2d: input: expected a tensor on the CPU (no CUDA kernels: {missing}), got {x.device}"
    )


@needs_kernels
def test_kernels_of_another_cuda_are_refused(monkeypatch):
    built = torch.ops.adderops._cuda_version() // 1000
    assert str(built) == torch.version.cuda.split(".")[0]
    monkeypatch.setattr(torch.version, "cuda", f"{built + 1}.2")
    assert _ops._load_cuda_kernels() == (
        f"they are built with CUDA {built}, this torch with CUDA {built + 1}.2: "
        "run `ADDEROPS_CUDA=1 pip install .` in the checkout"
    )


def test_other_devices_are_named():
    with FakeTensorMode():
        x, w = torch.empty(2, 4, 5, 6, device="mps"), torch.empty(8, 4, 3, 3, device="mps")
    with pytest.raises(ValueError, match="input: expected a tensor on the CPU or a CUDA device, got mps"):
        adder_conv2d(x, w)


@pytest.mark.slow
def test_a_package_without_the_library(tmp_path):
    """In a copy of the package, in its own process, the CPU kernels work and there are no CUDA kernels."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA: the library would not be loaded anyway")
    shutil.copytree(INSTALLED, tmp_path / "adderops", ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    code = (
        "import torch, adderops; from adderops.info import describe; "
        "print(adderops.functional.adder_conv2d(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).item()); "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('adderops::adder_conv2d', 'CUDA')); "
        "print(describe()['CUDA kernels'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    result, registered, kernels = run.stdout.splitlines()
    assert (result, registered) == ("-1.0", "False")
    assert re.match("none: adderops was built without them: .*run `ADDEROPS_CUDA=1 pip install .`", kernels)


# --- the benchmark ---


@pytest.mark.slow
def test_the_benchmark_says_what_is_missing():
    if torch.cuda.is_available() and not _ops.CUDA_KERNELS_MISSING:
        pytest.skip("nothing is missing here")
    command = [sys.executable, CHECKOUT / "benchmarks" / "bench_adder.py", "--device", "cuda"]
    environ = {**os.environ, "PYTHONPATH": str(INSTALLED.parent)}
    run = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert run.returncode == 1 and re.search("^--device cuda: (no GPU|adderops has no CUDA kernels)", run.stderr)


def test_the_bound_of_the_model(monkeypatch):
    """Terms per clock and multiprocessor x multiprocessors x clock; a step runs the three passes in turn."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "benchmarks"))
    from harness import cuda_device

    device = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    monkeypatch.setattr(cuda_device, "highest_clock", lambda: 1_500_000_000)
    unit = 132 * 1.5e9
    step = 3 / (1 / 64 + 1 / 64 + 1 / 128)
    assert cuda_device.bounds(torch.float32) == pytest.approx(
        {"forward": 64 * unit, "grad_x": 64 * unit, "grad_w": 128 * unit, "step": step * unit}
    )
    assert cuda_device.bounds(torch.bfloat16)["forward"] == pytest.approx(128 * unit)
    device.major = 99
    assert cuda_device.bounds(torch.float32) == {}
