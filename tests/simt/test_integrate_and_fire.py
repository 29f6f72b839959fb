"""The source of the CUDA kernels of integrate-and-fire neurons, run on the host against the definition."""

from itertools import product

import pytest
import torch
from ops.test_integrate_and_fire import NUMBERS, assert_equal

from adderops import reference
from simt import builder, host
from simt.builder import ORDERS

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# T and a step in the order of memory: whole vectors or not, several blocks, steps about a group of 4
SHAPES = [
    (1, 1, 1, 8),
    (4, 2, 3, 8),
    (9, 3, 5, 16),
    (6, 1, 2, 1100),
    (4, 4, 3, 6),
    (5, 2, 3, 7),
    (3, 1, 1, 1),
    (0, 2, 2, 4),
]


def build(variant: str = "plain") -> host.Kernels:
    return host.build(variant, host.NEURONS)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple]]:
    """x, and pairs of threshold and initial membrane that neurons share or do not."""
    generator = torch.Generator().manual_seed(sum(shape))
    wide = torch.promote_types(dtype, torch.float32)

    def quarters(least: int, most: int, *sizes: int) -> torch.Tensor:
        return (torch.randint(least, most, sizes, generator=generator).to(wide) / 4).expand(shape[1:])

    _, n, c, s = shape
    x = torch.randint(-4, 9, shape, generator=generator).to(dtype) / 4
    return x, [
        (quarters(1, 9, 1, 1, 1), None),
        (quarters(1, 9, 1, c, 1), quarters(-4, 4, 1, 1, s)),
        (quarters(1, 9, 1, s, c).transpose(1, 2) if s == c else quarters(1, 9, 1, c, s), quarters(-4, 4, n, c, s)),
    ]


def define(x, threshold, initial, *options) -> tuple[torch.Tensor, ...]:
    """The definition in float64, whose parameters are those of each neuron."""
    state = torch.zeros(x.shape[1:]) if initial is None else initial
    flat = x.double().flatten(1)[:, None]  # one image
    found = reference.integrate_and_fire(flat, threshold.double().flatten(), state.double().flatten(), *options)
    return tuple(y.view(like.shape) for y, like in zip(found, (x, x.new_empty(x.shape[1:]), state), strict=True))


def check(kernels: host.Kernels, shapes=SHAPES, dtypes=DTYPES, orders=ORDERS) -> None:
    for i, (dtype, shape) in enumerate(product(dtypes, shapes)):
        x, parameters = inputs(shape, dtype)
        for j, (threshold, initial) in enumerate(parameters):
            options = (*NUMBERS[(i + j) % 2], j % 2 == 0, (i + j) % 3 == 0)
            got = kernels.integrate_and_fire(x, threshold, initial, *options, order=orders[(i + j) % len(orders)])
            want = define(x, threshold, initial, *options)
            assert_equal(got, want, dtype, f"{shape}, {dtype}, parameters {j}, {options}")


@pytest.mark.parametrize("variant", ("plain", "race"))
def test_against_float64(variant):
    """Values; and no race, no access out of bounds, no vector at an address that is none."""
    check(build(variant))


def test_operands_anywhere_in_memory():
    """Vectors where all of them are aligned; a constant current; every request."""
    for dtype, (x_at, gap) in product(DTYPES[:3], ((0, 0), (1, 0), (0, 8), (0, 3), (4, 8))):
        x, [(threshold, initial), *_] = inputs((6, 2, 4, 8), dtype)
        store = torch.zeros(6, x[0].numel() + gap + x_at, dtype=dtype)
        moved = store[:, x_at : x_at + x[0].numel()].unflatten(1, x.shape[1:]).copy_(x)
        for current in (moved, moved[:1].expand_as(x)):
            options = (*NUMBERS[1], True, True)
            want = define(current, threshold, initial, *options)
            assert_equal(build("race").integrate_and_fire(current, threshold, initial, *options), want, dtype, x_at)
            for wanted in product((False, True), repeat=3):
                got = build().integrate_and_fire(current, threshold, initial, *options, wanted=wanted)
                some = [y for y, want in zip(want, wanted, strict=True) if want]
                assert all(torch.equal(a.double(), b) for a, b in zip(got, some, strict=True))


def test_special_numbers():
    """A NaN never fires and stays; an infinite membrane fires, and is reset to 0 or stays."""
    x = torch.randn(5, 1, 2, 8, generator=torch.Generator().manual_seed(1))
    x[1, 0, 0, 3], x[2, 0, 1, 4], x[2, 0, 1, 5] = float("nan"), float("inf"), -float("inf")
    for subtract, dtype in product((False, True), DTYPES[:3]):
        options = (0.9, 1.1, 0.7, subtract, False)
        want = reference.integrate_and_fire(x.to(dtype), torch.ones(1), None, *options)
        got = build().integrate_and_fire(x.to(dtype), torch.ones(1).expand(1, 2, 8), None, *options)
        assert_equal(got, want, dtype, options)


@pytest.mark.slow
def test_sanitized():
    """AddressSanitizer and UBSan over every kernel, in a process of their own."""
    calls, wanted = [], []
    for dtype, shape in product(DTYPES, ((5, 2, 3, 8), (5, 2, 3, 7))):
        x, parameters = inputs(shape, dtype)
        for threshold, initial in parameters:
            options = (*NUMBERS[1], True, True)
            calls.append(("integrate_and_fire", (x, threshold, initial, *options), {}))
            wanted.append(define(x, threshold, initial, *options))
    for got, want, call in zip(host.run_sanitized(calls, host.NEURONS), wanted, calls, strict=True):
        assert_equal(got, want, call[1][0].dtype, call[1][0].shape)
