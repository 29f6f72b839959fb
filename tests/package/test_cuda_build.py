"""CUDA without a GPU: when the kernels are built, for which architectures, and that they load and register.

The toolkits here are folders whose nvcc is a script; tests/gpu runs the kernels on a GPU.
"""

import importlib.util
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
OPERATORS = ("adder_conv2d", "adder_conv2d_grad_x", "adder_conv2d_grad_w", "adder_conv2d_int8", "quantize")

needs_kernels = pytest.mark.skipif(
    _ops.CUDA_KERNELS_MISSING is not None, reason=f"no CUDA kernels: {_ops.CUDA_KERNELS_MISSING}"
)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "_build" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolkits = load("cuda_toolkit")

NVCC = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
*--list-gpu-arch*) printf '{archs}' ;;
*--dryrun*) printf '#$ _HERE_=x\\n#$ TOP={home}/bin/..\\n' >&2 ;;
esac
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def toolkit(home: Path, version="13.0", archs=("75", "80", "87", "120"), include="include", libraries="lib64") -> Path:
    """Makes a folder that looks like a toolkit."""
    listed = "".join(f"compute_{arch}\\n" for arch in archs)
    script(home / "bin" / "nvcc", NVCC.format(version=version, archs=listed, home=home))
    for folder, name in ((include, "cuda_runtime_api.h"), (libraries, "libcudart_static.a")):
        (home / folder).mkdir(parents=True, exist_ok=True)
        (home / folder / name).touch()
    return home


def wrapper(folder: Path, nvcc: Path) -> str:
    """Returns a PATH whose nvcc is a script that calls another nvcc."""
    script(folder / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    return f"{folder}:/usr/bin:/bin"


def test_nvcc_says_where_it_lives(tmp_path):
    home = toolkit(tmp_path / "cuda-13.0")
    environ = {"PATH": wrapper(tmp_path / "bin", home / "bin" / "nvcc")}
    found, reason = toolkits.choose_toolkit(environ, "13.2")
    assert (found.home, found.version) == (home, (13, 0))
    assert (found.include, found.libraries) == (home / "include", home / "lib64")
    assert reason == f"nvcc 13.0 in {home}"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_the_variable_wins_over_the_path(variable, tmp_path):
    on_path, named = toolkit(tmp_path / "a", "13.0"), toolkit(tmp_path / "b", "13.1")
    environ = {"PATH": wrapper(tmp_path / "bin", on_path / "bin" / "nvcc"), variable: str(named)}
    assert toolkits.find_toolkit(environ).home == named
    # a wrong name is an error, not a reason to fall back
    with pytest.raises(toolkits.Unavailable, match=f"{variable}={tmp_path}/c holds no bin/nvcc"):
        toolkits.find_toolkit({**environ, variable: f"{tmp_path}/c"})


def test_a_toolkit_with_targets(tmp_path):
    target = "targets/x86_64-linux"
    home = toolkit(tmp_path, include=f"{target}/include", libraries=f"{target}/lib")
    found = toolkits.find_toolkit({"CUDA_HOME": str(home)})
    assert (found.include, found.libraries) == (home / target / "include", home / target / "lib")


@pytest.mark.parametrize("missing", ["include/cuda_runtime_api.h", "lib64/libcudart_static.a"])
def test_a_compiler_alone_is_no_toolkit(missing, tmp_path):
    (toolkit(tmp_path) / missing).unlink()
    with pytest.raises(toolkits.Unavailable, match=f"{tmp_path} holds no {Path(missing).name}"):
        toolkits.find_toolkit({"CUDA_HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "request_, version, torch_cuda, outcome",
    [
        (None, "13.0", "13.2", "built"),
        ("AUTO", "13.2", "13.0", "built"),
        ("1", "13.0", "13.2", "built"),
        ("1", "13.0", None, "built"),  # the library does not depend on the CUDA of this torch
        ("0", "13.0", "13.2", "ADDEROPS_CUDA=0"),
        ("auto", "13.0", None, "this torch is built without CUDA"),
        ("auto", "12.8", "13.2", "nvcc 12.8 in .*, but torch is built with CUDA 13.2"),
        ("auto", "9.2", "13.2", "the major versions must be equal"),
        ("auto", "13.0", "9.2", "the major versions must be equal"),
        ("auto", None, "13.2", "holds no bin/nvcc"),
        ("1", "12.8", "13.2", "error: ADDEROPS_CUDA=1: nvcc 12.8 .*; set CUDA_HOME to a toolkit of CUDA 13, or"),
        ("1", None, "13.2", "error: ADDEROPS_CUDA=1: CUDA_HOME=.* holds no bin/nvcc; set CUDA_HOME"),
        ("1", None, None, "error: ADDEROPS_CUDA=1: .*; set CUDA_HOME to a toolkit of CUDA 13"),
        ("on", "13.0", "13.2", "error: ADDEROPS_CUDA: expected auto, 0 or 1, got 'on'"),
    ],
)
def test_the_decision(request_, version, torch_cuda, outcome, tmp_path):
    environ = {"CUDA_HOME": str(toolkit(tmp_path, version) if version else tmp_path)}
    if request_ is not None:
        environ["ADDEROPS_CUDA"] = request_
    if outcome.startswith("error: "):
        with pytest.raises((toolkits.Unavailable, ValueError), match=outcome.removeprefix("error: ")):
            toolkits.choose_toolkit(environ, torch_cuda)
        return
    found, reason = toolkits.choose_toolkit(environ, torch_cuda)
    assert (found is not None) == (outcome == "built")
    assert re.search("nvcc 13" if found else outcome, reason)


def test_no_toolkit_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(toolkits, "USUAL_NVCC", str(tmp_path / "nvcc"))
    found, reason = toolkits.choose_toolkit({"PATH": str(tmp_path)}, "13.2")
    assert found is None and reason.startswith("no CUDA toolkit found")


def test_the_architectures_that_the_compiler_knows(tmp_path):
    found = toolkits.find_toolkit({"CUDA_HOME": str(toolkit(tmp_path, archs=("75", "90a", "100", "120")))})
    assert found.architectures() == {"7.5", "10.0", "12.0"}


@pytest.mark.parametrize(
    "named, known, chosen",
    [
        (None, {"7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"}, "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        (None, {"5.0", "7.5", "8.0", "8.6", "8.9", "9.0"}, "7.5;8.0;8.6;8.9;9.0+PTX"),  # an older toolkit
        ("", {"9.0", "10.0"}, "9.0;10.0+PTX"),
        ("8.0", {"9.0"}, "8.0"),  # an unknown architecture is left to nvcc to refuse
        (" 8.0 9.0+PTX; ", {"9.0"}, "8.0;9.0+PTX"),
    ],
)
def test_the_architectures_to_build_for(named, known, chosen):
    assert toolkits.arch_list({} if named is None else {"TORCH_CUDA_ARCH_LIST": named}, known) == chosen


@pytest.mark.parametrize("named", ["Ampere", "native", "80", "8.0;sm_90", "8.0,9.0"])
def test_architectures_are_numbers(named):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected numbers as in 8.0;9.0[+]PTX, got "):
        toolkits.arch_list({"TORCH_CUDA_ARCH_LIST": named}, {"8.0"})


def test_a_compiler_for_other_architectures():
    with pytest.raises(toolkits.Unavailable, match="none of 7.5, .*; set TORCH_CUDA_ARCH_LIST"):
        toolkits.arch_list({}, {"5.0"})


def setup_decides(**environ: str) -> list[str]:
    """Returns what setup.py would build: its message, and the names of the libraries."""
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--version']; found = runpy.run_path('setup.py'); "
        "print(found['DECISION']); print(*(e.name for e in found['EXTENSIONS']))"
    )
    unset = ("ADDEROPS_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH")
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, env=clean | environ, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-2:]


@pytest.mark.slow
def test_setup_follows_the_decision(tmp_path):
    home = toolkit(tmp_path, f"{torch.version.cuda or '13.0'}")
    assert setup_decides(ADDEROPS_CUDA="1", CUDA_HOME=str(home)) == [
        f"CPU kernels and CUDA kernels for 7.5;8.0;12.0+PTX (nvcc {torch.version.cuda or '13.0'} in {home})",
        "adderops._C adderops._cuda",
    ]
    assert setup_decides(ADDEROPS_CUDA="0", CUDA_HOME=str(home)) == [
        "CPU kernels only (ADDEROPS_CUDA=0)",
        "adderops._C",
    ]


@pytest.mark.parametrize("folder", ["csrc/cpu", "csrc/cuda"])
def test_no_two_sources_share_an_object_file(folder):
    stems = Counter(path.stem for path in (CHECKOUT / folder).iterdir() if path.suffix in (".cpp", ".cu"))
    assert stems and set(stems.values()) == {1}, stems


# --- the library, if it was built: it loads and registers without a GPU ---


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
        ("library", r"adderops was built without them: install the CUDA toolkit .* \(CUDA_HOME .*ADDEROPS_CUDA=1 pip"),
        ("loading", r"_cuda.abi3.so does not load \(undefined symbol\): run `ADDEROPS_CUDA=1 pip install .`"),
    ],
)
def test_a_cuda_tensor_without_kernels(cause, says, monkeypatch):
    """The causes and the tensor are faked; the question and the answer are real."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: cause != "torch")
    monkeypatch.setattr(_ops, "find_spec", lambda name: None if cause == "library" else name)
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
    assert kernels.startswith("none: adderops was built without them: install the CUDA toolkit")


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

    device = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_500_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    unit = 132 * 1.5e9
    step = 3 / (1 / 64 + 1 / 64 + 1 / 128)
    assert cuda_device.bounds(torch.float32) == pytest.approx(
        {"forward": 64 * unit, "grad_x": 64 * unit, "grad_w": 128 * unit, "step": step * unit}
    )
    assert cuda_device.bounds(torch.bfloat16)["forward"] == pytest.approx(128 * unit)
    device.major = 99
    assert cuda_device.bounds(torch.float32) == {}
