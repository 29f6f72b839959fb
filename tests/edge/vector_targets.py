"""What tests of the NEON and SSE2 kernels share: layers to run, compilers, and the self-test of the micro-kernels."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import case, random_case

from .host_kernels import KERNELS
from .kernel_layers import ROWS_1, TAPS, Layer, add_residual, add_shortcut, layer_of
from .test_kernels import BYTE_CASES, RULES, layers_of, one_image, rule

STRICT = ("-Wall", "-Wextra", "-Werror", "-pedantic")
CLANG_AARCH64 = ("clang", "--target=aarch64-linux-gnu", "-ffreestanding")

CONTRACTING = "-std=gnu99 -O3 -ffp-contract=fast"
CONTRACTIBLE = "float z(float a, float b, float c) { return b + a * c; }\n"
FMA = re.compile(r"\b(fn?m(?:add|sub)|fml[as]|vfn?m[as]|vml[as]\.f|vf?n?m(?:add|sub)\d*[sp]s)\b")


def layers(step: int = 1) -> list[Layer]:
    """Returns layers of every order, output rule, residual and remainder of filters and pixels."""
    found = []
    for i, c in enumerate([*map(one_image, BYTE_CASES), *(one_image(random_case(seed)) for seed in range(24))][::step]):
        for layer in layers_of(c, list(RULES)[i % len(RULES)], i):
            found.append(layer)
            if i % 3 == 1:
                add_residual(layer, floats=i % 2 == 0)
            elif i % 3 == 2 and c.groups == 1:
                add_shortcut(layer, 3 + 5 * (i % 2), 1 + i % 2)
    return [*found, *halves(), *(layer_of(case("three-left", (1, 8, 2, 4), filters, 1)) for filters in (3, 7))]


def halves() -> list[Layer]:
    """Returns layers with many z halfway between two integers, which round to the even one."""
    found = []
    for filters in (4, 5):
        layer = layer_of(case("halves", (1, 8, 3, 8), filters, 3, padding=1))
        layer.x, layer.w, layer.outside = layer.x % 4, layer.w % 4, 1
        layer.a[:], layer.b[:] = -0.5, 128
        found.append(layer)
    return found


def largest() -> list[tuple[Layer, np.ndarray]]:
    """Returns layers whose sums exceed 16 bits in every lane and 2^24 in all, in both orders, with z of them."""
    found = []
    for x, w in ((255, 0), (0, 255), (0, 0)):
        for c, order in ((case("taps", (1, 7280, 3, 4), 5, 3), TAPS), (case("rows", (1, 7280, 3, 6), 5, 3), ROWS_1)):
            layer = layer_of(c, rule=rule("floats"), order=order)
            layer.x[:], layer.w[:] = x, w
            z = layer.b + layer.a * np.float32(9 * 7280 * abs(x - w))
            found.append((layer, np.broadcast_to(z, layer.y_shape)))
    return found


def wrong(run, layer: Layer) -> str:
    """Returns what is wrong with the result of run(layer), or nothing."""
    got, expected = run(layer), layer.expected()
    n = int((got != expected).sum())
    return (
        f"{layer.kind} of {layer.case!r}, {layer.rule}, order {layer.order}: {n} of {expected.size} differ" if n else ""
    )


def zig(target: str, *options: str) -> list[str]:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs a cross compiler: pip install ziglang")
    return [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        target,
        *options,
        "-Wno-unused-command-line-argument",
        "-fno-sanitize=all",
    ]


def self_test(compiler: list[str], runner: list[str], folder: Path, options: str) -> None:
    """Compiles sums.c with the micro-kernels and runs it."""
    for tool in (compiler[0], *runner[:1]):
        if shutil.which(tool) is None:
            packages = "Debian: gcc-aarch64-linux-gnu, qemu-user-static"
            pytest.skip(f"needs {tool} ({packages})")
    kernels = [
        *(KERNELS / name for name in ("layers.h", "prelude.c", "finish_float.c")),
        *sorted(KERNELS.glob("sums_*.c")),
    ]
    text = "".join(path.read_text() for path in [*kernels, Path(__file__).parent / "sums.c"])
    source, program = folder / "sums.c", folder / "sums"
    source.write_text(f"#define ADDER_EPILOGUE_INTEGER 0\n{text}")
    command = [*compiler, *options.split(), *STRICT, "-Wno-unused-function", str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    assert subprocess.run([*runner, str(program)], timeout=120).returncode == 0


def assembly(compiler: list[str], source: str, folder: Path, options: str) -> str:
    """Returns what the compiler makes of a C file, as assembler text."""
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs {compiler[0]}")
    file = folder / "kernels.c"
    file.write_text(source)
    command = [*compiler, *options.split(), *STRICT, "-S", str(file), "-o", str(folder / "kernels.s")]
    subprocess.run(command, check=True, timeout=300)
    return (folder / "kernels.s").read_text()
