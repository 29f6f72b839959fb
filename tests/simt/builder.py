"""Compiles the CUDA sources for the host and loads them; objects and libraries are cached under build/simt.

The key of an object is a hash of the compiler, the flags, and the text of the source and of all that it includes.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
EXECUTOR = ("context", "executor", "collectives", "simt_interface")
KEPT_DAYS = 7
ORDERS = ("forward", "reverse", "random")  # of threads and blocks

BASE = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-DADDEROPS_SIMT")
# The kernels reinterpret memory as CUDA allows; contraction to FMA would depend on the machine.
KERNELS = ("-fno-strict-aliasing", "-ffp-contract=off")
SANITIZED = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
# variant: flags of everything, of the kernels, of the executor
VARIANTS = {
    "plain": ((), ("-O1", "-g1"), ("-O3",)),
    # a 16-byte access stays one access, so that its alignment is checked
    "race": (("-DSIMT_RACE_CHECKER",), ("-O1", "-g1", "-fsanitize=thread", "-fno-tree-sra"), ("-O3",)),
    "asan": (SANITIZED, (), ()),
}


def compiler() -> str | None:
    """The C++ compiler: $CXX, or g++, or c++; None without one."""
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("c++")


@cache
def _compiler_version(command: str) -> str:
    return (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout + os.uname().machine
    )


@cache
def cache_folder() -> Path:
    """Where objects and libraries are kept: build/simt of the checkout, or the system's folder for temporary files."""
    folder = ROOT / "build" / "simt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"adderops-simt-{os.getuid()}"
        folder.mkdir(exist_ok=True)
    oldest = time.time() - KEPT_DAYS * 86400
    for path in folder.iterdir():
        if path.is_file() and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
    return folder


def _texts(source: Path, folders: tuple[Path, ...], seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source and everything that it includes with quotes."""
    if source not in seen:
        seen[source] = source.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[source], re.MULTILINE):
            for folder in (source.parent, *folders):
                path = (folder / name.decode()).resolve()
                if path.is_file():
                    _texts(path, folders, seen)
                    break
    return seen


def _make(name: str, key: tuple, command: list[str]) -> Path:
    """The path of a cached file; runs `command`, with the output's path appended, unless the file is there."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    path = cache_folder() / f"{digest}-{name}"
    if path.exists():
        path.touch()
        return path
    unfinished = path.with_name(f"{os.getpid()}-{time.monotonic_ns()}-{path.name}")
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    os.replace(unfinished, path)  # another process may have made the same file meanwhile
    return path


def _compile(source: Path, flags: tuple[str, ...], csrc: Path) -> Path:
    cxx, folders = compiler(), (csrc, HERE)
    includes = [f"-I{folder}" for folder in folders]
    # messages and line tables name files relative to the checkout, for mutants too
    maps = [f"-ffile-prefix-map={folder}/=" for folder in (csrc.parent, ROOT)]
    contents = sorted(_texts(source, folders, {}).values())
    command = [cxx, *flags, *includes, *maps, "-x", "c++", "-c", str(source)]
    return _make(source.stem + ".o", (_compiler_version(cxx), flags, source.name, contents), command)


def build(variant: str, kernels: tuple[Path, ...], csrc: Path = CSRC, more: tuple[str, ...] = ()) -> Path:
    """A shared library of `kernels`, compiled against the headers of `csrc`, with the executor and `more` of it."""
    everything, of_kernels, of_executor = VARIANTS[variant]
    names = (*EXECUTOR, *more, *(("race_checker",) if variant == "race" else ()))
    # The executor comes first: the linker keeps the first of equal inline functions, and its own must not be watched.
    jobs = [(HERE / f"{name}.cpp", (*BASE, *everything, *of_executor)) for name in names]
    jobs += [(path, (*BASE, *everything, *KERNELS, *of_kernels)) for path in kernels]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: _compile(*job, csrc.resolve()), jobs))
    link = [*(everything if variant == "asan" else ()), "-shared", "-Wl,-Bsymbolic"]
    if variant != "asan":
        link.append("-Wl,-z,defs")  # a __tsan function that the checker lacks fails here
    key = (_compiler_version(compiler()), link, [path.name for path in objects])
    return _make(f"{variant}.so", key, [compiler(), *map(str, objects), *link])


class Library:
    """A loaded library of the executor."""

    def __init__(self, path: Path):
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.simt_configure.argtypes = (ctypes.c_int, ctypes.c_uint64, ctypes.c_int)
        self.c.simt_watch.argtypes = (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_void_p,
        )
        self.c.simt_findings.restype = ctypes.c_char_p

    def configure(self, order: str = "forward", seed: int = 1, poison: int = 0xFF) -> None:
        """The order of threads and blocks, one of ORDERS, and the byte that fills fresh memory."""
        self.c.simt_configure(ORDERS.index(order), seed, poison)

    def findings(self) -> list[str]:
        """The findings of the race checker since the last call, with their places in the source."""
        return self.with_places(self.c.simt_findings().decode()).splitlines()

    def statistics(self) -> dict[str, int]:
        """Launches, blocks, barriers of blocks and collectives of warps since the library was loaded."""
        four = (ctypes.c_int64 * 4)()
        self.c.simt_statistics(four)
        return dict(zip(("launches", "blocks", "barriers", "collectives"), four, strict=True))

    def with_places(self, text: str) -> str:
        """Replaces {offset} by file:line, where addr2line is installed."""
        tool, offsets = shutil.which("addr2line"), sorted(set(re.findall(r"\{(0x[0-9a-f]+)\}", text)))
        for offset in offsets if tool else ():
            command = [tool, "-i", "-e", str(self.path), offset]
            frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            # innermost first: skip the accessors
            names = [re.sub(r" \(discriminator \d+\)", "", f) for f in frames]
            named = [f for f in names if not re.search(r"(dialect\.cuh|elements\.h|simt\.h):|\?", f)] or names
            text = text.replace(f"{{{offset}}}", named[0].removeprefix(f"{ROOT}/"))
        return text


def sanitized_python(code: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs Python code that loads a library of the variant "asan", with the sanitizer preloaded."""
    asan = subprocess.run([compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0"
    environment = os.environ | {
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(HERE.parent),
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
