"""The NEON kernels: bit for bit in emulated processors, and the instructions that compilers make of them."""

import re

import numpy as np
import pytest
from cases import case
from slow import slow_except

from .emulated_kernels import machine, run
from .host_kernels import source
from .kernel_layers import ROWS_1, layer_of
from .vector_targets import (
    CLANG_AARCH64,
    CONTRACTIBLE,
    CONTRACTING,
    FMA,
    assembly,
    largest,
    layers,
    self_test,
    wrong,
    zig,
)

COMPILERS = {
    "gcc": lambda: ["aarch64-linux-gnu-gcc"],
    "clang": lambda: list(CLANG_AARCH64),
    "zig": lambda: zig("aarch64-linux-musl"),
}


@pytest.fixture(params=COMPILERS)
def compiler(request):
    return COMPILERS[request.param]()


@pytest.mark.parametrize("options", slow_except((CONTRACTING,), ["-std=c99 -O0", "-std=c99 -O2", CONTRACTING]))
@pytest.mark.parametrize("name", slow_except(("gcc",), ["gcc", "zig"]))
def test_adder_conv(name, options, tmp_path):
    kernels = machine(tmp_path, "aarch64", options.split(), name)
    for layer in layers(2 if options == CONTRACTING else 7):
        assert not wrong(lambda layer: run(kernels, layer)[0], layer)


@pytest.mark.parametrize("name", slow_except(("gcc",), ["gcc", "zig"]))
def test_the_largest_sums(name, tmp_path):
    kernels = machine(tmp_path, "aarch64", compiler=name)
    for layer, expected in largest():
        assert (run(kernels, layer)[0] == expected).all(), layer.case


@pytest.mark.parametrize("options", ["-std=c99 -O0", "-std=c99 -O3"])
def test_micro_kernels_on_aarch64(options, tmp_path):
    self_test([*COMPILERS["gcc"](), "-static"], ["qemu-aarch64-static"], tmp_path, options)


@pytest.mark.parametrize("options", ["-std=gnu99 -O0", "-std=gnu99 -O3"])
def test_micro_kernels_on_arm_of_32_bits(options, tmp_path):
    compiler = zig("arm-linux-eabihf", "-mcpu=cortex_a7", "-static", "-nostdlib", "-ffreestanding", "-DNO_LIBC")
    self_test(compiler, ["qemu-arm-static"], tmp_path, options)


def hot_loops(text: str) -> list[list[str]]:
    """Returns the innermost loops with uadalp: the instructions from a label to the branch back to it."""
    found = []
    lines = [re.sub(r"^\s*#.*|\s*//.*", "", line).strip() for line in text.splitlines()]
    statements = [part.strip() for line in lines for part in re.split(r";|\\n", line) if part.strip()]
    for end, statement in enumerate(statements):
        branch = re.match(r"(?:b\.?ne|b\.?gt|cbnz\s+\w+,)\s+(\S+)$", statement)
        if not branch:
            continue
        label = branch[1][:-1] if re.fullmatch(r"\d+b", branch[1]) else branch[1]
        starts = [i for i in range(end) if statements[i] == f"{label}:"]
        body = statements[starts[-1] + 1 : end + 1] if starts else []
        if any(line.startswith("uadalp") for line in body) and not any(line.endswith(":") for line in body):
            found.append([line for line in body if not line.startswith(".")])
    return found


@pytest.mark.parametrize(
    "options",
    slow_except(("-std=c99 -O2",), ["-std=c99 -O0", "-std=c99 -O2", "-std=c99 -O3", "-std=gnu99 -Os -mcpu=cortex-a53"]),
)
def test_hot_loop(compiler, options, tmp_path):
    """256 terms in at most 40 instructions: 16 uabd, 16 uadalp, 3 loads, none of the stack."""
    if "ziglang" in compiler:
        options = options.replace("-mcpu=cortex-a53", "-mcpu=cortex_a53")
    tiles = [loop for loop in hot_loops(assembly(compiler, source(), tmp_path, options)) if "ld2" in " ".join(loop)]
    assert tiles
    for loop in tiles:
        names = [line.split()[0] for line in loop]
        assert names.count("uabd") == names.count("uadalp") == 16
        assert len(loop) <= 40 and not any("[sp" in line for line in loop)


def test_instructions_of_a_layer(tmp_path):
    """The sums of a layer of 64 channels, then all of it: gathering, spreading and epilogue included."""
    kernels = machine(tmp_path, "aarch64", compiler="gcc")
    layer = layer_of(case("layer", (1, 64, 8, 8), 64, 3, padding=1), order=ROWS_1)
    _, done = run(kernels, layer, count=True)
    terms = layer.case.terms["forward"] * np.prod(layer.y_shape)
    assert done.functions["sums_of_pairs"].instructions / terms < 0.156
    assert done.instructions / terms < 0.21


def test_no_product_is_contracted(compiler, tmp_path):
    assert FMA.search(assembly(compiler, CONTRACTIBLE, tmp_path, CONTRACTING))
    found = FMA.findall(assembly(compiler, source(), tmp_path, CONTRACTING))
    assert not found, f"{found} in kernels whose products must be rounded"
