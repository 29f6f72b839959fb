"""Decides whether to build the CUDA kernels, with which toolkit, and for which architectures.

A toolkit that is here is used whether or not the machine has a GPU: wheels are built without one.  A GPU, or
ADDEROPS_CUDA=1, makes the build fetch nvcc where there is none.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

# One per generation that the toolkit supports; PTX of the last serves later GPUs.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

USUAL_NVCC = "/usr/local/cuda/bin/nvcc"

# The oldest CUDA of which PyPI has nvcc.  What it compiles runs on every driver of its major version and later.
OLDEST_ON_PYPI = "13.0"


class Unavailable(Exception):
    """Why there is no toolkit to build with."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile the kernels and link the static runtime."""

    home: Path
    version: tuple[int, int]
    include: Path
    libraries: Path

    def __str__(self) -> str:
        return "nvcc {}.{} in {}".format(*self.version, self.home)

    def architectures(self) -> set[str]:
        """Returns the architectures that this nvcc compiles for, as "8.0"."""
        listed = _output(self.home / "bin" / "nvcc", "--list-gpu-arch")
        return {f"{major}.{minor}" for major, minor in re.findall(r"^compute_(\d+)(\d)$", listed, re.M)}


def find_toolkit(environ: Mapping[str, str], torch_cuda: str | None = None) -> Toolkit:
    """Returns the toolkit that CUDA_HOME or CUDA_PATH names, else the first usable one: nvcc on the PATH, in
    /usr/local/cuda, in a Python package.

    Args:
        environ: CUDA_HOME, CUDA_PATH, PATH.
        torch_cuda: `torch.version.cuda`, whose major version the toolkit must have.

    Raises:
        Unavailable: there is none, or it is incomplete or of another major version.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            home = Path(environ[variable])
            if not (home / "bin" / "nvcc").is_file():
                raise Unavailable(f"{variable}={home} holds no bin/nvcc")
            return _checked(home, torch_cuda)
    usual = Path(shutil.which("nvcc", path=environ.get("PATH")) or USUAL_NVCC)
    packaged = [nvcc for folder in sys.path for nvcc in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))]
    first = None
    for nvcc in filter(Path.is_file, [usual, *packaged]):
        try:
            return _checked(_home_of(nvcc), torch_cuda)
        except Unavailable as reason:
            first = first or reason
    raise first or Unavailable("no CUDA toolkit found (nvcc is not on the PATH, CUDA_HOME is not set)")


def choose_toolkit(environ: Mapping[str, str], torch_cuda: str | None) -> tuple[Toolkit | None, str]:
    """Returns the toolkit to build the CUDA kernels with, or None, and the reason.

    Args:
        environ: ADDEROPS_CUDA = auto (default), 1 or 0; CUDA_HOME, CUDA_PATH, PATH.
        torch_cuda: `torch.version.cuda`.

    Raises:
        ValueError: an unknown ADDEROPS_CUDA.
        Unavailable: ADDEROPS_CUDA=1, but there is no usable toolkit.
    """
    request = _request(environ)
    if request == "0":
        return None, "ADDEROPS_CUDA=0"
    if torch_cuda is None and request == "auto":
        return None, "this torch is built without CUDA"
    try:
        toolkit = find_toolkit(environ, torch_cuda)
    except Unavailable as reason:
        package = _package(environ, torch_cuda)
        if request == "1":
            major = _numbers(torch_cuda or OLDEST_ON_PYPI)[0]
            install = f"pip install '{package}', " if package else ""
            raise Unavailable(
                f"ADDEROPS_CUDA=1: {reason}; {install}set CUDA_HOME to a toolkit of CUDA {major}, "
                "or ADDEROPS_CUDA to 0 for the CPU kernels alone"
            ) from None
        if package and not visible_gpus():
            return None, f"{reason}; ADDEROPS_CUDA=1 would fetch nvcc, but no GPU is visible"
        return None, f"{reason}; pip install '{package}' brings nvcc" if package else str(reason)
    return toolkit, str(toolkit)


def missing_packages(environ: Mapping[str, str], torch_cuda: str | None) -> list[str]:
    """Returns what pip has to install before the build: nvcc, if it is wanted (ADDEROPS_CUDA=1, or a GPU) and not here.

    Raises:
        ValueError: an unknown ADDEROPS_CUDA.
    """
    request = _request(environ)
    if request == "0" or (request == "auto" and not (torch_cuda and visible_gpus())):
        return []
    try:
        find_toolkit(environ, torch_cuda)
    except Unavailable:
        package = _package(environ, torch_cuda)
        return [package] if package else []
    return []


@functools.cache
def visible_gpus() -> frozenset[str]:
    """Returns the compute capabilities, as "9.0", of the GPUs that the driver shows to a CUDA program."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return frozenset()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return frozenset()
    found = set()
    for index in range(count.value):
        # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if not (
            driver.cuDeviceGet(ctypes.byref(device), index)
            or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
            or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        ):
            found.add(f"{major.value}.{minor.value}")
    return frozenset(found)


def arch_list(environ: Mapping[str, str], known: Set[str], gpus: Set[str] = frozenset()) -> str:
    """Returns TORCH_CUDA_ARCH_LIST if it is set, else the architectures of the GPUs, else DEFAULT_ARCHS.

    TORCH_CUDA_ARCH_LIST=all stands for DEFAULT_ARCHS whatever GPUs there are; so does a GPU that nvcc does not know.
    Of DEFAULT_ARCHS those that are `known` are built, with PTX of the last.

    Raises:
        ValueError: a name such as Ampere instead of a number: the library must know which devices run its code.
        Unavailable: none of DEFAULT_ARCHS is known.
    """
    named = environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ")
    if named and named != "all":
        archs = re.split(r"[;\s]+", named)
        if not all(re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", arch) for arch in archs):
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected all, or numbers as in 8.0;9.0+PTX, got {';'.join(archs)!r}"
            )
        return ";".join(archs)
    if gpus and gpus <= known and not named:
        return ";".join(sorted(gpus, key=float))
    chosen = [arch for arch in DEFAULT_ARCHS if arch in known]
    if not chosen:
        raise Unavailable(f"nvcc compiles for none of {', '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


def _request(environ: Mapping[str, str]) -> str:
    request = environ.get("ADDEROPS_CUDA", "auto").lower()
    if request not in ("auto", "0", "1"):
        raise ValueError(f"ADDEROPS_CUDA: expected auto, 0 or 1, got {environ['ADDEROPS_CUDA']!r}")
    return request


def _package(environ: Mapping[str, str], torch_cuda: str | None) -> str | None:
    """Returns the package that brings nvcc for this torch; None where there is none, or a variable names a toolkit."""
    version = torch_cuda or OLDEST_ON_PYPI
    if environ.get("CUDA_HOME") or environ.get("CUDA_PATH") or _numbers(version) < _numbers(OLDEST_ON_PYPI):
        return None
    return f"cuda-toolkit[nvcc]=={version}.*"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))  # numbers, not strings: "9" > "13"


def _checked(home: Path, torch_cuda: str | None) -> Toolkit:
    """Returns the toolkit in a folder.  Raises Unavailable."""
    include = _first(home, "cuda_runtime_api.h", ("include", "targets/*/include"))
    libraries = _first(home, "libcudart_static.a", ("lib64", "lib", "targets/*/lib"))
    release = re.search(r"release (\d+)\.(\d+)", _output(home / "bin" / "nvcc", "--version"))
    if not release:
        raise Unavailable(f"{home}/bin/nvcc --version names no release")
    toolkit = Toolkit(home, (int(release[1]), int(release[2])), include, libraries)
    if torch_cuda and toolkit.version[0] != _numbers(torch_cuda)[0]:
        raise Unavailable(f"{toolkit}, but torch is built with CUDA {torch_cuda}: the major versions must be equal")
    return toolkit


def _output(*command: object) -> str:
    """Returns what a command prints, on either stream: nvcc --dryrun answers on stderr."""
    try:
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run ({error})") from None
    return done.stdout


def _home_of(nvcc: Path) -> Path:
    """Asks an nvcc for its toolkit: the file on the PATH may be a script, or a link made by a package manager."""
    says = _output(nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null")
    top = re.search(r"^#\$ TOP=(.+)$", says, re.M)
    home = Path(top[1].strip()) if top else nvcc.resolve().parents[1]
    if not (home / "bin" / "nvcc").is_file():
        raise Unavailable(f"{nvcc} belongs to {home}, which holds no bin/nvcc")
    return home.resolve()


def _first(home: Path, name: str, folders: tuple[str, ...]) -> Path:
    """Returns the first of the folders that holds the file."""
    for pattern in folders:
        for folder in sorted(home.glob(pattern)):
            if (folder / name).is_file():
                return folder
    raise Unavailable(f"{home} holds no {name}: the toolkit is not complete")
