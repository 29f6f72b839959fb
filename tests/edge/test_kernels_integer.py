"""The kernels with the fixed-point epilogue against `adderops.reference.fixed_point_epilogue`, bit for bit."""

import numpy as np
import pytest
from cases import Case, case, random_case
from slow import slow_except

from .fixed_layers import RULES, FixedLayer, fixed_layer, with_residual
from .host_kernels import C_TARGET, library, run
from .kernel_layers import BYTES, FLOATS, INTEGERS, NO_RESIDUAL, RESIDUAL_BYTES, SHORTCUT
from .test_kernels import BYTE_CASES, depthwise_cases, one_image, orders

FLAGS = {"C": f"-std=c99 -O2 {C_TARGET}", "chosen": "-std=c99 -O2"}
KINDS = (NO_RESIDUAL, RESIDUAL_BYTES, SHORTCUT)


@pytest.fixture(scope="module", params=slow_except(("C",), FLAGS))
def kernels(request, tmp_path_factory):
    return library(tmp_path_factory.mktemp("integer"), "gcc", FLAGS[request.param], "finish_integer.c")


def check(kernels, layer: FixedLayer) -> np.ndarray:
    got, expected = run(kernels, layer), layer.expected()
    wrong = int((got != expected).sum())
    assert wrong == 0, f"{layer.kind} of {layer.case!r}, {layer.rule}: {wrong} of {expected.size} differ"
    return got


def cases() -> list[Case]:
    return [one_image(c) for c in [*BYTE_CASES[::3], *(random_case(seed) for seed in range(12))]]


@pytest.mark.parametrize("name", RULES)
def test_adder_conv(kernels, name):
    seen = []
    for i, c in enumerate(cases()):
        for order in orders(c):
            for kind in (KINDS[i % 3], NO_RESIDUAL):
                if kind != SHORTCUT or c.groups == 1:
                    layer = with_residual(fixed_layer(c, "adder_conv", name, i, order=order), kind, 1 + i % 2)
                    seen.append(check(kernels, layer).ravel())
    values = np.concatenate(seen)
    assert len(np.unique(values)) > 50


@pytest.mark.parametrize("name", RULES)
def test_depthwise(kernels, name):
    for i, c in enumerate(depthwise_cases()[::3]):
        for kind in (NO_RESIDUAL, RESIDUAL_BYTES):
            check(kernels, with_residual(fixed_layer(c, "adder_depthwise", name, i), kind))


@pytest.mark.parametrize("name", RULES)
def test_multiply_conv(kernels, name):
    ends = [case("stem", (1, 3, 7, 8), 6, 3, padding=1), case("fc", (1, 64, 1, 1), 10), case("k5", (1, 5, 6, 6), 3, 5)]
    for i, c in enumerate(ends):
        for kind in (NO_RESIDUAL, RESIDUAL_BYTES):
            check(kernels, with_residual(fixed_layer(c, "multiply_conv", name, i), kind))


def test_over_the_input(kernels):
    overlapping = 0
    for c in cases():
        layer = fixed_layer(c, "adder_conv", "bytes", ring=True)
        if layer.may_overlap:
            check(kernels, layer)
            overlapping += 1
    assert overlapping > 2


def test_ties_are_rounded_up_and_shifts_go_to_minus_infinity(kernels):
    """z = sum / 4 - 2: sums 0 ... 20 give -2, -1.75, -1.5 (-1), -1.25 (-1), ... and bytes clamp at 0."""
    c = case("ties", (1, 4, 1, 21), 1, 1)
    layer = fixed_layer(c, "adder_conv", "integers")
    layer.x[:], layer.w[:] = 0, 0
    layer.x[0, :, 0] = np.arange(21)
    layer.a[:], layer.b[:] = 0.25, -2
    expected = np.floor(np.arange(21) / 4 - 2 + 0.5).astype(np.int32)
    assert (check(kernels, layer).ravel() == expected).all()
    layer.rule.form = BYTES
    assert (check(kernels, layer).ravel() == expected.clip(0)).all()
    assert {INTEGERS, FLOATS} < {r.form for r in RULES.values()}
