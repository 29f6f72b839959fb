"""The size of a generated network's code: compiled and read from the symbols, not modelled."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from adderops.edge.cost import TARGETS

COMPILER = "arm-none-eabi-gcc"
_FLAGS = {
    "cortex-m4": ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"),
    "cortex-m33": ("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16"),
}
_PART = re.compile(r"// --- (.+?)(?:\.[ch])? ---$")


def code_size(file: str | os.PathLike[str], target: str = "cortex-m4") -> dict[str, int]:
    """Returns the bytes of code in each part of a generated file, compiled with -O2, without weights and constants.

    Args:
        file: NAME.c of `export_c`, with NAME.h next to it.
        target: one of `adderops.edge.cost.TARGETS`; with its floating-point unit.

    Returns:
        Bytes by kernel file ('gather', 'multiply_conv', ...; 'the network' is the list of calls), largest first.

    Raises:
        ValueError: another target.
        FileNotFoundError: no such file, or arm-none-eabi-gcc is not on the PATH.
        RuntimeError: the file does not compile.

    >>> sum(code_size("network.c").values())  # doctest: +SKIP
    5464
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    if shutil.which(COMPILER) is None:
        raise FileNotFoundError(f"{COMPILER} is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "network.o")
        flags = (*_FLAGS[target], "-mthumb", "-mfloat-abi=hard", "-std=c99", "-O2", "-g")
        _run(COMPILER, *flags, "-c", os.fspath(file), "-o", made)
        symbols = _run(COMPILER.replace("gcc", "nm"), "-S", "-l", "--defined-only", made)
    sizes: dict[str, int] = {}
    for size, line in re.findall(r"^\w+ (\w+) [tT] \S+\t.*:(\d+)$", symbols, re.MULTILINE):
        part = next(found[1] for text in lines[int(line) - 1 :: -1] if (found := _PART.match(text)))
        sizes[part] = sizes.get(part, 0) + int(size, 16)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
