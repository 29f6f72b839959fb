"""Decides whether to build the CUDA kernels, with which toolkit, and for which architectures.

Whether the build machine has a GPU does not matter: wheels are built without one.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# One per generation that the toolkit supports; PTX of the last serves later GPUs.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

USUAL_NVCC = "/usr/local/cuda/bin/nvcc"


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


def find_toolkit(environ: Mapping[str, str]) -> Toolkit:
    """Returns the toolkit that CUDA_HOME or CUDA_PATH names, else that of the nvcc on the PATH or in /usr/local/cuda.

    Raises:
        Unavailable: there is none, or it is incomplete.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            home = Path(environ[variable])
            if not (home / "bin" / "nvcc").is_file():
                raise Unavailable(f"{variable}={home} holds no bin/nvcc")
            break
    else:
        nvcc = shutil.which("nvcc", path=environ.get("PATH")) or USUAL_NVCC
        if not Path(nvcc).is_file():
            raise Unavailable("no CUDA toolkit found (nvcc is not on the PATH, CUDA_HOME is not set)")
        home = _home_of(Path(nvcc))
    include = _first(home, "cuda_runtime_api.h", ("include", "targets/*/include"))
    libraries = _first(home, "libcudart_static.a", ("lib64", "lib", "targets/*/lib"))
    release = re.search(r"release (\d+)\.(\d+)", _output(home / "bin" / "nvcc", "--version"))
    if not release:
        raise Unavailable(f"{home}/bin/nvcc --version names no release")
    return Toolkit(home, (int(release[1]), int(release[2])), include, libraries)


def choose_toolkit(environ: Mapping[str, str], torch_cuda: str | None) -> tuple[Toolkit | None, str]:
    """Returns the toolkit to build the CUDA kernels with, or None, and the reason.

    Args:
        environ: ADDEROPS_CUDA = auto (default), 1 or 0; CUDA_HOME, CUDA_PATH, PATH.
        torch_cuda: `torch.version.cuda`.

    Raises:
        ValueError: an unknown ADDEROPS_CUDA.
        Unavailable: ADDEROPS_CUDA=1, but there is no usable toolkit.
    """
    request = environ.get("ADDEROPS_CUDA", "auto").lower()
    if request not in ("auto", "0", "1"):
        raise ValueError(f"ADDEROPS_CUDA: expected auto, 0 or 1, got {environ['ADDEROPS_CUDA']!r}")
    if request == "0":
        return None, "ADDEROPS_CUDA=0"
    try:
        if torch_cuda is None and request == "auto":
            raise Unavailable("this torch is built without CUDA")
        toolkit = find_toolkit(environ)
        # numbers, not strings: "9" > "13"
        if torch_cuda and toolkit.version[0] != int(torch_cuda.split(".")[0]):
            raise Unavailable(f"{toolkit}, but torch is built with CUDA {torch_cuda}: the major versions must be equal")
    except Unavailable as reason:
        if request == "1":
            raise Unavailable(
                f"ADDEROPS_CUDA=1: {reason}; set CUDA_HOME to a toolkit of CUDA {(torch_cuda or '13').split('.')[0]}, "
                "or ADDEROPS_CUDA to 0 for the CPU kernels alone"
            ) from None
        return None, str(reason)
    return toolkit, str(toolkit)


def arch_list(environ: Mapping[str, str], known: set[str]) -> str:
    """Returns TORCH_CUDA_ARCH_LIST if it is set, else DEFAULT_ARCHS as far as they are `known`, with PTX of the last.

    Raises:
        ValueError: a name such as Ampere instead of a number: the library must know which devices run its code.
        Unavailable: none of DEFAULT_ARCHS is known.
    """
    if environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        archs = re.split(r"[;\s]+", environ["TORCH_CUDA_ARCH_LIST"].strip("; "))
        if not all(re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", arch) for arch in archs):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected numbers as in 8.0;9.0+PTX, got {';'.join(archs)!r}")
        return ";".join(archs)
    chosen = [arch for arch in DEFAULT_ARCHS if arch in known]
    if not chosen:
        raise Unavailable(f"nvcc compiles for none of {', '.join(DEFAULT_ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


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
