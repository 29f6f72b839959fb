"""The harness of benchmarks/: what the tests here compile and emulate with; a missing tool is a skip that names it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import cortex_m  # noqa: E402


def toolchain(name: str | None = None, core: str = "cortex-m4") -> cortex_m.Toolchain:
    """The named compiler, or the first one there is; skips where it or the emulator is missing."""
    for package in ("unicorn", "capstone"):
        pytest.importorskip(package, reason=f"needs {package}: {cortex_m.TOOLS}")
    try:
        return cortex_m.toolchain(name, core)
    except cortex_m.Unavailable as reason:
        pytest.skip(str(reason))


def compiled(source: str, folder: Path, entries, core="cortex-m4", name=None, options=("-O2", "-std=c99"), suffix="c"):
    """A machine with a program of one source text."""
    file = folder / f"source.{suffix}"
    file.write_text(source)
    return cortex_m.Machine(toolchain(name, core).compile(core, [file], entries, options))
