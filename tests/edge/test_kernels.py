"""The kernels of generated networks against the operators' definition, bit for bit: geometries, orders, rules."""

import numpy as np
import pytest
from cases import CASES, SELECTED, Case, case, random_case
from slow import slow_except

from .host_kernels import C_TARGET, library, run
from .kernel_layers import (
    BYTES,
    FLOATS,
    QUANTIZED,
    ROWS_1,
    ROWS_2,
    SUMS,
    Layer,
    Rule,
    add_residual,
    add_shortcut,
    layer_of,
)

RULES = {
    "bytes": Rule(BYTES),
    "bytes clamped": Rule(BYTES, least=11, most=195),
    "quantized": Rule(QUANTIZED, least=7, most=201, zero_point=30, inverse=0.7),
    "floats": Rule(FLOATS),
    "floats relu": Rule(FLOATS, relu=True),
    "sums": Rule(SUMS, inverse=3.3),
    "sums relu": Rule(SUMS, relu=True, inverse=3.3, bound=500),
}


def rule(name: str) -> Rule:
    return Rule(**vars(RULES[name]))


BYTE_CASES = [
    *(case(f"rows-in{c}-out{o}", (1, c, 5, 8), o, 3, padding=1) for c in (4, 8, 12, 16) for o in (1, 2, 5)),
    *(case(f"rows{w}-s{s}", (1, 8, 5, w), 6, 3, stride=s, padding=1) for w in (3, 4, 5, 6, 7, 9, 11) for s in (1, 2)),
    case("rows-k1x3", (1, 4, 3, 9), 3, (1, 3)),
    case("rows-k5x3", (1, 8, 7, 9), 3, (5, 3), padding=(2, 0, 1, 3), stride=(2, 1)),
    case("rows-dilated", (1, 8, 9, 9), 3, 3, padding=1, dilation=(2, 1), stride=(3, 2)),
    case("rows-groups", (1, 24, 5, 6), 9, 3, padding=1, groups=3),
    case("k7x1", (1, 6, 9, 4), 5, (7, 1), padding=(3, 0)),
    case("k1x7", (1, 6, 4, 9), 5, (1, 7), padding=(0, 3)),
    case("k5", (1, 12, 6, 6), 7, 5, padding=2),
    case("taps-groups-crossing", (1, 8, 5, 5), 6, 3, padding=1, groups=2),
    *(case(f"1x1-{p}", (1, 16, 1, p), 5, 1) for p in (1, 2, 3, 4, 5, 9)),
]


def one_image(c: Case) -> Case:
    return Case(**{**vars(c), "N": 1})


def some_rules(c: Case, n: int) -> list[tuple[int, str]]:
    """Returns n of the rules, with their numbers; others for other cases."""
    first = sum(c.name.encode())
    return [((first + i) % len(RULES), list(RULES)[(first + i) % len(RULES)]) for i in range(n)]


def orders(c: Case) -> list[int]:
    rows = c.KW == 3 and c.dilation[1] == 1 and c.stride[1] <= 2 and c.C_in // c.groups % 4 == 0
    return [0, {1: ROWS_1, 2: ROWS_2}[c.stride[1]]] if rows else [0]


def check(kernels, layer: Layer) -> None:
    got, expected = run(kernels, layer), layer.expected()
    wrong = int((got != expected).sum())
    assert wrong == 0, f"{layer.kind} of {layer.case!r}, {layer.rule}: {wrong} of {expected.size} differ"


def layers_of(c: Case, name: str, seed: int) -> list[Layer]:
    """Returns the layer in each order, and again over its own input where that is possible."""
    found = [layer_of(c, seed=seed, rule=rule(name), order=order) for order in orders(c)]
    over = [layer_of(c, seed=seed, rule=rule(name), order=order, ring=True) for order in orders(c)]
    return found + [layer for layer in over if layer.may_overlap]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return library(tmp_path_factory.mktemp("kernels"))


SMALL = [one_image(c) for c in [*CASES, *BYTE_CASES] if c.H * c.W * c.C_in < 20000 and np.prod(c.w_shape) < 30000]


@pytest.mark.parametrize("c", SMALL[::6] + [one_image(c) for c in BYTE_CASES], ids=str)
def test_adder_conv(kernels, c):
    for seed, name in some_rules(c, 2):
        for layer in layers_of(c, name, seed):
            check(kernels, layer)


def test_adder_conv_in_random_geometries(kernels):
    overlapping = 0
    for seed in range(80):
        for layer in layers_of(one_image(random_case(seed)), list(RULES)[seed % len(RULES)], seed):
            check(kernels, layer)
            overlapping += layer.ring
    assert overlapping > 5


@pytest.mark.parametrize("c", [one_image(c) for c in [*SELECTED[::3], *BYTE_CASES[::2]]], ids=str)
def test_residuals(kernels, c):
    for seed, name in some_rules(c, 2):
        for layer in layers_of(c, name, 3):
            check(kernels, add_residual(layer, floats=seed % 2 == 1))
            if c.groups == 1:
                for channels, stride in ((3, 1), (8, 2)):
                    layer.residual = None
                    check(kernels, add_shortcut(layer, channels, stride))


def depthwise_cases() -> list[Case]:
    options = [
        {},
        dict(padding=1),
        dict(padding=1, stride=2),
        dict(stride=(1, 2), padding=(0, 2, 1, 3)),
        dict(dilation=2),
    ]
    found = [
        case(f"depthwise{c}-{i}", (1, c, 7, 8), c, 3, groups=c, **o)
        for c in (1, 3, 4, 6, 8, 33)
        for i, o in enumerate(options)
    ]
    more = [
        case("depthwise-k2x4", (1, 8, 5, 6), 8, (2, 4), groups=8),
        case("depthwise-k17x15", (1, 4, 18, 17), 4, (17, 15), groups=4),
    ]
    return found + more


@pytest.mark.parametrize("c", depthwise_cases(), ids=str)
def test_depthwise(kernels, c):
    for _, name in some_rules(c, 3):
        layer = layer_of(c, "adder_depthwise", rule=rule(name))
        check(kernels, layer)
        check(kernels, add_residual(layer))
        check(kernels, add_residual(layer, floats=True))


def test_depthwise_over_its_input(kernels):
    for c in depthwise_cases():
        layer = layer_of(c, "adder_depthwise")
        if np.prod(c.y_shape) <= layer.x.size:
            layer.ring = True  # y is x
            check(kernels, layer)


@pytest.mark.parametrize("c", [one_image(c) for c in SMALL[::9] if c.groups == 1], ids=str)
def test_multiply_conv(kernels, c):
    for seed, name in some_rules(c, 3):
        check(kernels, layer_of(c, "multiply_conv", seed, rule=rule(name)))


@pytest.mark.parametrize("x_and_w", slow_except(((255, 0),), [(255, 0), (0, 255), (0, 0), (255, 255)]))
def test_the_largest_and_smallest_sums(kernels, x_and_w):
    for c in (case("large", (1, 7280, 3, 3), 3, 3), case("large-depthwise", (1, 4, 1, 257), 4, (1, 257), groups=4)):
        layer = layer_of(c, "adder_depthwise" if c.groups > 1 else "adder_conv", rule=rule("floats"))
        layer.x[:], layer.w[:] = x_and_w
        check(kernels, layer)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize(
    "flags", ["-std=gnu99 -O3 -march=native -ffp-contract=fast", *slow_except((), ["-std=c99 -O0", "-std=c99 -O3"])]
)
def test_compilers(tmp_path, compiler, flags):
    kernels = library(tmp_path, compiler, f"{flags} {C_TARGET}")
    for c in [one_image(c) for c in SELECTED[::5]]:
        for name in RULES:
            for layer in layers_of(c, name, 5):
                check(kernels, add_residual(layer))
