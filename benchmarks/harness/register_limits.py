"""Measures how many terms per second the arithmetic alone allows: the loops of register_limits.cpp on this machine.

    python benchmarks/harness/register_limits.py

prints a table.  The benchmarks import `measure` and time the best loop of each pass among their contestants, so that a
share of the limit does not depend on the current clock frequency.  Needs a C++ compiler (CXX, or c++ on the path).
"""

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
_COMMON = ["-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC"]
_AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
# variant: (compiler flags, instruction sets of the operators that these loops bound)
_VARIANTS = {
    "x86_64": {
        "SSE2": (["-msse2", "-DVECTOR_BITS=128"], ("baseline", "avx2", "avx512")),
        "AVX2": (["-mavx2", "-mfma", "-DVECTOR_BITS=256"], ("avx2", "avx512")),
        "AVX-512/256": ([*_AVX512, "-DVECTOR_BITS=256"], ("avx512",)),
        "AVX-512/512": ([*_AVX512, "-DVECTOR_BITS=512"], ("avx512",)),
    },
    "aarch64": {"NEON": ([], ("baseline", "neon"))},
}
# The loops that bound each pass, by the prefix of their names.  A term of grad_w is one fused multiply-add.
PASS_LOOPS = {
    "forward": "forward",
    "grad_x": "grad_x",
    "grad_w": "convolution",
    "conv2d": "convolution",
    "int8": "int8",
}


class Unavailable(Exception):
    """Why there are no limits on this machine."""


@dataclass(frozen=True)
class Loop:
    """One tile of one loop for one instruction set; `rate` is its best rate on one thread, in terms per second."""

    name: str
    variant: str
    isas: tuple[str, ...]
    tile: tuple[int, int]
    terms: float  # per sweep
    seconds: Callable[[int], float] = field(repr=False)
    rate: float = 0.0


def _compile(variant: str, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of one variant, cached by source, flags and compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise Unavailable("no C++ compiler found (CXX, c++, g++, clang++)")
    command = [*compiler.split(), *_COMMON, *flags, str(SOURCE)]
    try:
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(repr(command).encode() + version + SOURCE.read_bytes()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adderops" / "register_limits"
        library = cache / f"{key}.so"
        if not library.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                built = Path(folder) / library.name
                subprocess.run([*command, "-o", str(built)], capture_output=True, check=True, text=True)
                built.replace(library)  # atomic: concurrent runs never load a partial file
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} fails for {variant}: {str(error.stderr).strip()[:300]}") from None
    except OSError as error:
        raise Unavailable(f"C++ compiler {compiler}: {error}") from None
    loaded = ctypes.CDLL(str(library))
    loaded.limit_name.restype = ctypes.c_char_p
    loaded.limit_terms.restype = ctypes.c_double
    loaded.limit_seconds.restype = ctypes.c_double
    loaded.limit_seconds.argtypes = [ctypes.c_int, ctypes.c_long]
    return loaded


def _loops() -> list[Loop]:
    variants = _VARIANTS.get(platform.machine())
    if variants is None:
        raise Unavailable(f"no loops for {platform.machine()}")
    with ThreadPoolExecutor(2) as pool:
        libraries = pool.map(lambda item: (item, _compile(item[0], item[1][0])), variants.items())
        loops = []
        for (variant, (_, isas)), library in libraries:
            for i in range(library.limit_count() if library.limit_runnable() else 0):
                name, tile = library.limit_name(i).decode(), (library.limit_rows(i), library.limit_cols(i))
                seconds = lambda sweeps, library=library, i=i: library.limit_seconds(i, sweeps)  # noqa: E731
                loops.append(Loop(name, variant, isas, tile, library.limit_terms(i), seconds))
    return loops


def measure(rounds: int = 5, sample: float = 0.001) -> list[Loop]:
    """The best tile per loop and instruction set, with its rate on one thread, the best of `rounds` samples.

    A sample lasts `sample` seconds.
    Raises Unavailable without a compiler or on a processor that register_limits.cpp does not support.
    """
    loops = _loops()
    sweeps = [max(1, int(sample / loop.seconds(20) * 20)) for loop in loops]
    best = [float("inf")] * len(loops)
    for _ in range(rounds):  # in turns: other work on the machine affects all loops alike
        for i, loop in enumerate(loops):
            best[i] = min(best[i], loop.seconds(sweeps[i]) / sweeps[i])
    result: dict[tuple[str, str], Loop] = {}
    for loop, seconds in zip(loops, best, strict=True):
        rate, key = loop.terms / seconds, (loop.name, loop.variant)
        if key not in result or rate > result[key].rate:
            result[key] = Loop(loop.name, loop.variant, loop.isas, loop.tile, loop.terms, loop.seconds, rate)
    return list(result.values())


def best_loop(loops: Sequence[Loop], name: str, isa: str) -> Loop:
    """The fastest loop whose name starts with `name`, among those that bound operators of instruction set `isa`."""
    usable = [loop for loop in loops if isa in loop.isas and loop.name.startswith(name)]
    return max(usable, key=lambda loop: loop.rate)


class Together:
    """Loops in sequence on one thread, scaled to `threads`: the limit of a pass or of a step.

    Registers belong to a core, so the rates of the threads add up.  Timing a single thread keeps the result independent
    of torch's worker threads, which keep spinning on the other cores for a while after each call.
    """

    def __init__(self, loops: Sequence[Loop], threads: int, seconds: float = 0.002) -> None:
        per_thread = seconds / sum(1 / loop.rate for loop in loops)
        self._work = [(loop, max(1, round(per_thread / loop.terms))) for loop in loops]
        self.terms = threads * sum(loop.terms * sweeps for loop, sweeps in self._work)

    def seconds(self, repeats: int) -> float:
        """Seconds on one thread, after a short run that wakes up the core."""
        self._work[0][0].seconds(self._work[0][1])
        return sum(loop.seconds(sweeps * repeats) for loop, sweeps in self._work)


def rates(loops: Sequence[Loop]) -> dict[str, float]:
    """{name (variant, tile): Gterm/s on one thread}."""
    return {f"{x.name} ({x.variant}, {x.tile[0]}x{x.tile[1]})": x.rate / 1e9 for x in loops}


def table(loops: Sequence[Loop]) -> str:
    """Gterm/s of every loop on one thread, one column per instruction set."""
    variants = list(dict.fromkeys(loop.variant for loop in loops))
    lines = [f"{'Gterm/s, one thread (tile)':36}" + "".join(f"{variant:>15}" for variant in variants)]
    for name in sorted(dict.fromkeys(loop.name for loop in loops)):
        of_name = {loop.variant: loop for loop in loops if loop.name == name}
        cells = (of_name.get(variant) for variant in variants)
        row = (f"{loop.rate / 1e9:.1f} ({loop.tile[0]}x{loop.tile[1]})" if loop else "-" for loop in cells)
        lines.append(f"{name:36}" + "".join(f"{cell:>15}" for cell in row))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    try:
        print(table(measure()))
    except Unavailable as reason:
        raise SystemExit(f"no register-only limits: {reason}") from None


if __name__ == "__main__":
    main()
