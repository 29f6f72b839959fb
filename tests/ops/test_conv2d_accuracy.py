"""The three passes on real numbers: no further from float64 than the arithmetic allows (tolerances.py)."""

from functools import cache

import pytest
import torch
from cases import (
    CASES,
    FORMATS,
    LAYER_CASES,
    PASSES,
    SELECTED,
    Case,
    Inputs,
    assert_same,
    case,
    compute,
    define,
    random_inputs,
)
from slow import slow_except
from tolerances import CANCELLATION, assert_within, gamma, tolerance

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@cache
def expected(name: str, c: Case, *data) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    inputs = random_inputs(c, *data)
    want = define(name, c, inputs)
    return inputs, want, tolerance(name, c, inputs, want)


def check(name: str, c: Case, backend, *data) -> None:
    inputs, want, bound = expected(name, c, *data)
    for form, how in FORMATS.items():
        arranged = inputs.arranged(how).to(inputs.x.dtype, backend.device)
        assert_within(compute(name, c, arranged), want, bound, f"{name} of {c!r}, {form}, {inputs.x.dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", CASES, ids=str)
def test_every_geometry(c, name, backend):
    check(name, c, backend, torch.float32)


@pytest.mark.parametrize("dtype", slow_except(DTYPES[:3], DTYPES), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_every_dtype(name, dtype, backend):
    for c in [*SELECTED, *LAYER_CASES]:
        check(name, c, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (100.0, *(pytest.param(v, marks=pytest.mark.slow) for v in (10.0, -100.0))))
@pytest.mark.parametrize("name", PASSES)
def test_common_offset(name, offset, dtype, backend):
    for c in SELECTED + (LAYER_CASES if dtype == torch.float32 else []):
        check(name, c, backend, dtype, 1.0, 1.0, offset)


@pytest.mark.parametrize(
    "x_scale, w_scale",
    [(1e-30, 1e-30), (1e-42, 1e-42), (1e30, 1e30), (1e-20, 1.0), (1.0, 1e-20), (1e4, 1e-4), (1e20, 1.0)],
)
@pytest.mark.parametrize("name", PASSES)
def test_magnitudes(name, x_scale, w_scale, backend):
    """Subnormal numbers are not flushed, no intermediate overflows, small numbers next to large ones are not lost."""
    for c in SELECTED:
        check(name, c, backend, torch.float32, x_scale, w_scale)


@pytest.mark.parametrize("scale", (0.01, 1e3), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_magnitudes_of_float16(name, scale, backend):
    """1e3: sums beyond 65504 become infinite, as the reference does when rounded to float16; 0.01: subnormal inputs."""
    for c in SELECTED:
        check(name, c, backend, torch.float16, scale, scale)


@pytest.mark.parametrize("offset", (10.0, 100.0, 1000.0, -1000.0))
def test_forward_does_not_cancel(offset, backend):
    """With numbers of one sign the error exceeds that of the direct form, gamma_K * |Y|, by a bounded factor only.

    The min form is used only if |sum x + sum w| <= CANCELLATION * |Y|.  Its three sums then add up to at most
    2 * CANCELLATION * |Y|.
    """
    for c in [*SELECTED, *LAYER_CASES]:
        if any(c.padding):  # a padded zero against the offset is a large term, not a common offset
            continue
        inputs = random_inputs(c, torch.float32, offset=offset)
        want = define("forward", c, inputs, bias=False)
        slack = gamma(c.terms["forward"] + 5, torch.float32)
        bound = (2 * CANCELLATION + 1) * slack * want.abs()
        got = compute("forward", c, inputs.to(torch.float32, backend.device), bias=False)
        assert_within(got, want, bound, f"forward of {c!r}, offset {offset}")


@pytest.mark.parametrize("sign", (1, -1))
def test_forward_near_the_largest_float(sign, backend):
    """The result is finite although twice a sum of minima would overflow."""
    c = case("largest", (2, 3, 4, 5), 18, 1)
    g = torch.Generator().manual_seed(0)
    x = -sign * 1e38 * (0.6 + 0.4 * torch.rand(c.x_shape, generator=g))
    w = sign * 1e36 * torch.rand(c.w_shape, generator=g)
    inputs = Inputs(x, w, torch.zeros(c.y_shape), torch.zeros(c.C_out)).to(torch.float32, backend.device)
    want = define("forward", c, inputs.to(torch.float32))
    assert want.abs().max() < torch.finfo(torch.float32).max
    bound = tolerance("forward", c, inputs.to(torch.float32), want)
    assert_within(compute("forward", c, inputs), want, bound, "forward")


def test_equal_operands_give_zero(backend):
    """x == w everywhere: the distance is exactly 0 at any magnitude, although sum x and sum w are not."""
    c = case("equal", (1, 40, 3, 3), 20, 3)
    for scale in (1e-40, 1.0, 1e30):
        filters = random_inputs(c, torch.float32, scale, scale).x.to(backend.device)
        w = filters.expand(c.C_out, -1, -1, -1)
        got = torch.ops.adderops.adder_conv2d(filters, w, None, *c.geometry)
        assert_same(got, torch.zeros(c.y_shape), f"forward of {c!r} times {scale}")
        got = torch.ops.adderops.adder_conv2d_grad_x(torch.ones_like(got), filters, w, *c.geometry)
        assert_same(got, torch.zeros(c.x_shape), f"grad_x of {c!r} times {scale}")
