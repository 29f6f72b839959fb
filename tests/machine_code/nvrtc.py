"""NVRTC, the CUDA compiler as a library, through ctypes: CUDA C++ to cubins without a GPU, nvcc or host compiler.

Every CUDA build of torch includes the library; on PyPI it is nvidia-cuda-nvrtc.
"""

import ctypes
import functools
import glob
import sys
import sysconfig
from collections.abc import Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """Why NVRTC cannot be used here."""


class CompileError(Exception):
    """The message and the log of NVRTC."""


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    names: dict[str, str]  # name expression: the symbol in the cubin
    log: str  # warnings


def _candidates() -> list[str]:
    """Paths and names to try: first the folders of installed packages, then the names known to the loader."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    patterns = ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*")
    found = [file for folder in folders if folder for pattern in patterns for file in glob.glob(f"{folder}/{pattern}")]
    found += sorted(glob.glob("/usr/local/cuda*/lib64/libnvrtc.so.*"), reverse=True)
    named = [find_library("nvrtc"), "libnvrtc.so.13", "libnvrtc.so.12"]
    return [name for name in [*found, *named] if name and "builtins" not in name and ".alt" not in name]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.  Raises Unavailable."""
    for name in _candidates():
        # The library opens its builtins by bare name, which the loader may not find inside a package.
        for builtins in glob.glob(str(Path(name).parent / "libnvrtc-builtins*")) if "/" in name else []:
            ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
        try:
            loaded = ctypes.CDLL(name)
        except OSError:
            continue
        loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
        return loaded
    raise Unavailable(
        "no NVRTC (libnvrtc.so): it comes with a CUDA build of torch, or with pip install nvidia-cuda-nvrtc"
    )


def _check(status: int, what: str) -> None:
    if status:
        raise CompileError(f"{what}: {library().nvrtcGetErrorString(status).decode()}")


@functools.cache
def version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


@functools.cache
def architectures() -> tuple[int, ...]:
    """The architectures of this NVRTC; 80 stands for sm_80."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
    values = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(values), "nvrtcGetSupportedArchs")
    return tuple(values)


def _bytes_of(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = library(), ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text), what)
    return text.raw


def compile(  # noqa: A001  (read as nvrtc.compile)
    source: str,
    name: str,
    arch: int,
    expressions: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    options: Sequence[str] = (),
) -> Compiled:
    """Compiles `source`, called `name` in messages, to a cubin for sm_`arch`.

    `expressions` name the kernels to keep, such as "scale<float, 4>"; naming an instance of a template instantiates it.
    Raises Unavailable, or CompileError with the log.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    create = (ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    _check(nvrtc.nvrtcCreateProgram(*create), "nvrtcCreateProgram")
    try:
        for expression in expressions:
            _check(nvrtc.nvrtcAddNameExpression(program, expression.encode()), expression)
        flags = [f"-arch=sm_{arch}", "-std=c++17", *(f"-I{folder}" for folder in include), *options]
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        )
        log = _bytes_of(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(f"{name}, sm_{arch}: {nvrtc.nvrtcGetErrorString(status).decode()}\n{log}")
        names = {}
        for expression in expressions:
            lowered = ctypes.c_char_p()
            _check(nvrtc.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(lowered)), expression)
            names[expression] = (lowered.value or b"").decode()
        return Compiled(_bytes_of(program, "CUBIN"), names, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
