"""The kernels on an emulated Cortex-M, in assembly and by intrinsics, bit for bit, in geometries of test_kernels.py."""

import pytest
from cases import SELECTED, case
from slow import slow_except

from .emulated_kernels import machine, run
from .kernel_layers import ROWS_1, Layer, Rule, add_residual, add_shortcut, layer_of
from .test_kernels import BYTE_CASES, RULES, depthwise_cases, layers_of, one_image, rule

ASSEMBLY, INTRINSICS, C = "-DADDER_TARGET=2", "-DADDER_TARGET=1", "-DADDER_TARGET=0"
BUILDS = {
    "assembly": ("cortex-m4", (ASSEMBLY, "-O2", "-std=c99")),
    "assembly-O0": ("cortex-m4", (ASSEMBLY, "-O0", "-std=c99")),
    "assembly-O3": ("cortex-m4", (ASSEMBLY, "-O3", "-std=gnu99", "-ffp-contract=fast")),
    "intrinsics": ("cortex-m4", (INTRINSICS, "-O2", "-std=c99")),
    "m33": ("cortex-m33", ("-O2", "-std=c99")),
    "m4-without-fpu": ("cortex-m4-soft", ("-O2", "-std=c99")),
    "clang": ("cortex-m4", ("-O2", "-std=c99"), "zig"),
}
EVEN = [case(f"even-in{c}-out{o}", (1, c, 5, 8), o, 3, padding=1) for c in (4, 16) for o in (2, 4, 6)]
EVEN += [case(f"even-s2-w{w}", (1, 8, 7, w), 4, 3, stride=2, padding=(0, 1, 0, 1)) for w in (8, 16, 17)]
EVEN += [case("even-1x1", (1, 16, 1, 12), 8, 1), case("even-1x1-s2", (1, 20, 5, 15), 6, 1, stride=2)]
EVEN += [case("even-groups", (1, 16, 5, 8), 8, 3, padding=1, groups=2), case("even-k5", (1, 8, 6, 8), 4, 5, padding=2)]


@pytest.fixture(scope="module", params=slow_except(("assembly",), BUILDS))
def emulated(request, tmp_path_factory):
    return machine(tmp_path_factory.mktemp("emulated"), *BUILDS[request.param])


def check(emulated, layer: Layer) -> None:
    got, _ = run(emulated, layer)
    expected = layer.expected()
    wrong = int((got != expected).sum())
    assert wrong == 0, f"{layer.kind} of {layer.case!r}, {layer.rule}: {wrong} of {expected.size} differ"


def test_adder_conv(emulated):
    for i, c in enumerate([*EVEN, *BYTE_CASES[::4], *(one_image(c) for c in SELECTED[::6])]):
        for seed, name in enumerate(RULES):
            if seed == 0 or (i + seed) % 5 == 0:
                for layer in layers_of(c, name, seed):
                    check(emulated, layer)


def test_residuals_and_shortcuts(emulated):
    for i, c in enumerate([*EVEN, *BYTE_CASES[::10]]):
        for name in ("bytes", list(RULES)[1 + i % (len(RULES) - 1)]):
            for layer in layers_of(c, name, 3):
                check(emulated, add_residual(layer, floats=i % 5 == 4))
                if c.groups == 1:
                    layer.residual = None
                    check(emulated, add_shortcut(layer, *((3, 1), (8, 2))[i % 2]))


def test_depthwise_and_multiplying(emulated):
    for i, c in enumerate(depthwise_cases()):
        check(emulated, layer_of(c, "adder_depthwise", rule=rule(list(RULES)[i % len(RULES)])))
        check(emulated, add_residual(layer_of(c, "adder_depthwise")))
    ends = [
        case("stem", (1, 3, 7, 8), 6, 3, padding=1),
        case("stem-s2", (1, 3, 9, 9), 5, 3, stride=2),
        case("fc", (1, 64, 1, 1), 10),
    ]
    for c in [*ends, *(one_image(c) for c in SELECTED[::8] if c.groups == 1)]:
        for name in ("bytes", "quantized", "floats"):
            check(emulated, layer_of(c, "multiply_conv", rule=rule(name)))


def test_more_steps_than_the_counter_of_the_assembly_holds(emulated):
    for c in (case("many-taps", (1, 4112, 1, 5), 2, 1), case("many-rows", (1, 1032, 1, 4), 2, (1, 3), padding=(0, 1))):
        for layer in layers_of(c, "floats", 1)[:2]:
            layer.x[:], layer.w[:] = 255, 0
            check(emulated, layer)
    assert layer_of(case("rows", (1, 1032, 1, 4), 2, (1, 3)), order=ROWS_1, rule=Rule()).words == 774
