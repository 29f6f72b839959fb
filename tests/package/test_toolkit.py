"""When the CUDA kernels are built, with which nvcc, and for which architectures.

The toolkits here are folders whose nvcc is a script, the driver a library of four functions.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, CHECKOUT / "_build" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


toolkits = load("cuda_toolkit")
visible_gpus = toolkits.visible_gpus


@pytest.fixture(autouse=True)
def no_other_toolkit(monkeypatch):
    """Neither this machine's toolkit nor its GPUs decide."""
    monkeypatch.setattr(toolkits, "USUAL_NVCC", "/nowhere/nvcc")
    monkeypatch.setattr(toolkits, "visible_gpus", frozenset)


def packaged(folder: Path, monkeypatch, version="13.0") -> Path:
    """Makes a toolkit of Python packages in a folder that Python searches."""
    monkeypatch.syspath_prepend(str(folder))
    return toolkit(folder / "nvidia" / f"cu{version.split('.')[0]}", version, libraries="lib")


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


def test_a_toolkit_of_packages(tmp_path, monkeypatch):
    """nvcc of a build requirement, if nothing else is usable; not the one for another CUDA, nor the rest of torch's."""
    other, mine = (packaged(tmp_path / v, monkeypatch, v) for v in ("14.0", "13.0"))
    (tmp_path / "torch" / "nvidia" / "cu13" / "include").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "torch"))
    assert toolkits.find_toolkit({"PATH": ""}, "13.0").home == mine
    assert toolkits.find_toolkit({"PATH": ""}, "14.2").home == other
    old, new = toolkit(tmp_path / "old", "12.4"), toolkit(tmp_path / "new", "13.1")
    assert toolkits.find_toolkit({"PATH": wrapper(tmp_path / "a", old / "bin" / "nvcc")}, "13.0").home == mine
    assert toolkits.find_toolkit({"PATH": wrapper(tmp_path / "b", new / "bin" / "nvcc")}, "13.0").home == new
    # a variable is an order
    with pytest.raises(toolkits.Unavailable, match="nvcc 12.4 in .*, but torch is built with CUDA 13.0"):
        toolkits.find_toolkit({"CUDA_HOME": str(old)}, "13.0")


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


NVCC_13_2 = "cuda-toolkit[nvcc]==13.2.*"


@pytest.mark.parametrize(
    "request_, torch_cuda, gpus, package, says",
    [
        ("auto", "13.2", (), None, "; ADDEROPS_CUDA=1 would fetch nvcc, but no GPU is visible"),
        ("auto", "13.2", ("9.0",), NVCC_13_2, f"; pip install '{NVCC_13_2}' brings nvcc"),
        ("1", "13.2", (), NVCC_13_2, f"; pip install '{NVCC_13_2}', set CUDA_HOME to a toolkit of CUDA 13, or"),
        ("1", None, (), "cuda-toolkit[nvcc]==13.0.*", "set CUDA_HOME to a toolkit of CUDA 13, or ADDEROPS_CUDA to 0"),
        ("auto", None, ("9.0",), None, "this torch is built without CUDA"),
        ("0", "13.2", ("9.0",), None, "ADDEROPS_CUDA=0"),
        ("auto", "12.8", ("9.0",), None, "CUDA_HOME is not set)"),  # PyPI has no nvcc of CUDA 12
        ("1", "12.8", ("9.0",), None, "; set CUDA_HOME to a toolkit of CUDA 12, or"),
    ],
)
def test_no_toolkit_at_all(request_, torch_cuda, gpus, package, says, tmp_path, monkeypatch):
    """What the build backend asks pip for, and what is said where it still is not there."""
    monkeypatch.setattr(toolkits, "visible_gpus", lambda: frozenset(gpus))
    environ = {"PATH": str(tmp_path), "ADDEROPS_CUDA": request_}
    assert toolkits.missing_packages(environ, torch_cuda) == ([package] if package else [])
    if request_ == "1":
        with pytest.raises(toolkits.Unavailable, match="ADDEROPS_CUDA=1: no CUDA toolkit found") as error:
            toolkits.choose_toolkit(environ, torch_cuda)
        reason = str(error.value)
    else:
        found, reason = toolkits.choose_toolkit(environ, torch_cuda)
        assert found is None
    assert says in reason


@pytest.mark.parametrize("where", ["on the path", "named", "named in vain", "packaged"])
def test_nothing_is_fetched_that_is_here(where, tmp_path, monkeypatch):
    home = toolkit(tmp_path / "cuda")
    environ = {"PATH": str(tmp_path), "ADDEROPS_CUDA": "1"}
    if where == "on the path":
        environ["PATH"] = wrapper(tmp_path / "bin", home / "bin" / "nvcc")
    elif where == "packaged":
        packaged(tmp_path, monkeypatch)
    else:
        environ["CUDA_HOME"] = str(home if where == "named" else tmp_path)
    assert toolkits.missing_packages(environ, "13.2") == []


DRIVER = """
static const int kGpus[][2] = {{{GPUS}{{0, 0}}}};
extern "C" int cuInit(unsigned) {{ return {STATUS}; }}
extern "C" int cuDeviceGetCount(int* count) {{ *count = sizeof(kGpus) / sizeof(*kGpus) - 1; return 0; }}
extern "C" int cuDeviceGet(int* device, int index) {{ *device = 100 + index; return 0; }}
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {{
  if (attribute != 75 && attribute != 76) return 1;
  *value = kGpus[device - 100][attribute - 75];
  return 0;
}}
"""


def driver(folder: Path, *gpus: str, status=0) -> Path:
    """Makes the folder with the driver, libcuda.so.1, of a machine with these GPUs."""
    folder.mkdir()
    table = "".join(f"{{{gpu.replace('.', ', ')}}}, " for gpu in gpus)
    (folder / "driver.cpp").write_text(DRIVER.format(GPUS=table, STATUS=status))
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler for the driver")
    subprocess.run([compiler, "-shared", "-fPIC", "driver.cpp", "-o", "libcuda.so.1"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    "gpus, status, capabilities",
    [
        ([], 0, set()),
        (["9.0"], 0, {"9.0"}),
        (["12.0", "8.6", "12.0"], 0, {"8.6", "12.0"}),
        (["9.0"], 100, set()),  # cuInit: no device
        (None, 0, set()),  # no driver
    ],
)
def test_the_driver_says_which_gpus_are_here(gpus, status, capabilities, tmp_path, monkeypatch):
    folder = tmp_path / "none" if gpus is None else driver(tmp_path / "driver", *gpus, status=status)
    monkeypatch.setattr(toolkits.ctypes, "CDLL", lambda name: CDLL(str(folder / name)))
    assert visible_gpus.__wrapped__() == capabilities


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
        ("all", {"9.0", "10.0"}, "9.0;10.0+PTX"),
    ],
)
def test_the_architectures_to_build_for(named, known, chosen):
    assert toolkits.arch_list({} if named is None else {"TORCH_CUDA_ARCH_LIST": named}, known) == chosen


@pytest.mark.parametrize(
    "named, gpus, chosen",
    [
        ("", {"8.9"}, "8.9"),
        ("", {"12.0", "8.9"}, "8.9;12.0"),  # in the order of numbers
        ("", {"8.7"}, "8.7"),  # not in the default list
        ("", {"8.9", "13.0"}, "8.0;8.9;12.0+PTX"),  # nvcc does not know it: perhaps PTX serves
        ("all", {"8.9"}, "8.0;8.9;12.0+PTX"),  # for others too: a wheel
        ("8.0", {"8.9"}, "8.0"),
    ],
)
def test_a_gpu_narrows_the_architectures(named, gpus, chosen):
    known = {"8.0", "8.7", "8.9", "12.0"}
    assert toolkits.arch_list({"TORCH_CUDA_ARCH_LIST": named}, known, gpus) == chosen


@pytest.mark.parametrize("named", ["Ampere", "native", "80", "8.0;sm_90", "8.0,9.0", "8.0;all"])
def test_architectures_are_numbers(named):
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected all, or numbers as in 8.0;9.0[+]PTX, got "):
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
    none, ampere = driver(tmp_path / "none"), driver(tmp_path / "ampere", "8.0")
    assert setup_decides(ADDEROPS_CUDA="1", CUDA_HOME=str(home), LD_LIBRARY_PATH=str(none)) == [
        "CPU kernels and CUDA kernels for 7.5;8.0;12.0+PTX "
        f"(nvcc {torch.version.cuda or '13.0'} in {home}; visible GPUs: none)",
        "adderops._C adderops._cuda",
    ]
    assert setup_decides(ADDEROPS_CUDA="1", CUDA_HOME=str(home), LD_LIBRARY_PATH=str(ampere)) == [
        f"CPU kernels and CUDA kernels for 8.0 (nvcc {torch.version.cuda or '13.0'} in {home}; visible GPUs: 8.0)",
        "adderops._C adderops._cuda",
    ]
    assert setup_decides(ADDEROPS_CUDA="0", CUDA_HOME=str(home)) == [
        "CPU kernels only (ADDEROPS_CUDA=0)",
        "adderops._C",
    ]
