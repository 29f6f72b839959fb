"""NaN and infinity appear where the definition puts them, with its signs, and nowhere else.

One element of one operand is poisoned at a time.  Everything else is a small multiple of 1/4, so that finite results
must stay exact: a poison that leaks into a neighbouring lane, a padded column or an unreached pixel is detected.
"""

from functools import cache

import pytest
import torch
from cases import (
    FORMATS,
    PASSES,
    SELECTED,
    Case,
    Inputs,
    assert_same,
    case,
    compute,
    define,
    exact_inputs,
    exact_result,
)
from slow import slow_except

INF, NAN = float("inf"), float("nan")

# Border sums: taps without an input, pixels that no output reaches, lanes beyond the last channel.
SHAPES = [
    case("padded", (2, 5, 6, 7), 18, 3, padding=1),
    case("unpadded", (2, 16, 6, 5), 24, 3),
    case("padding-beyond-kernel", (1, 4, 3, 3), 6, 2, padding=3),
    case("stride-beyond-kernel", (2, 5, 9, 8), 17, 2, stride=(3, 4)),
    case("stride2", (1, 17, 7, 8), 9, 3, stride=2, padding=1),
    case("unreached-border", (2, 16, 8, 10), 9, 3, stride=2),
    case("pointwise", (2, 33, 3, 5), 40, 1),
    case("pointwise-s2", (1, 16, 5, 5), 16, 1, stride=2),
    case("groups", (1, 12, 5, 5), 18, 3, padding=1, groups=3),
    case("depthwise", (2, 20, 5, 6), 20, 3, padding=1, groups=20),
    case("dilated", (1, 6, 8, 9), 10, 3, padding=(0, 2, 2, 1), dilation=2),
    case("deep", (1, 140, 2, 3), 20, (1, 2)),
]


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The corners of a tensor, its middle, and one place on each edge."""
    last = [s - 1 for s in shape]
    middle = [s // 2 for s in shape]
    return sorted(
        {
            (0, 0, 0, 0),
            tuple(last),
            tuple(middle),
            (last[0], 0, 0, last[3]),
            (0, last[1], last[2], 0),
            (0, middle[1], 0, middle[3]),
            (last[0], middle[1], middle[2], 0),
        }
    )


# (operand, place or None for everywhere, value)
Poison = tuple[str, tuple[int, ...] | None, float]


def poisoned(inputs: Inputs, *poisons: Poison) -> Inputs:
    tensors = {f: getattr(inputs, f).clone() for f in ("x", "w", "grad_y", "bias")}
    for field, at, value in poisons:
        tensors[field][... if at is None else at] = value
    return Inputs(**tensors)


@cache
def expected(name: str, c: Case, *poisons: Poison) -> tuple[Inputs, torch.Tensor]:
    inputs = poisoned(exact_inputs(c), *poisons)
    return inputs, define(name, c, inputs)


def check(name: str, c: Case, dtype: torch.dtype, backend, *poisons: Poison) -> None:
    inputs, want = expected(name, c, *poisons)
    for form, how in FORMATS.items():
        arranged = inputs.arranged(how).to(dtype, backend.device)
        assert_same(compute(name, c, arranged), want.float().to(dtype), f"{name} of {c!r}, {form}, {dtype}, {poisons}")


OPERANDS = [("forward", "x"), ("forward", "w"), *((p, f) for p in ("grad_x", "grad_w") for f in ("grad_y", "x", "w"))]


@pytest.mark.parametrize("name, field", OPERANDS)
@pytest.mark.parametrize("c", slow_except(SHAPES[::2], SHAPES), ids=str)
def test_one_poisoned_element(c, name, field, backend):
    for value in (NAN, INF, -INF):
        for at in places(getattr(exact_inputs(c), field).shape):
            check(name, c, torch.float32, backend, (field, at, value))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name, field", OPERANDS)
def test_one_poisoned_element_of_other_dtypes(name, field, dtype, backend):
    for c in SHAPES[:6]:
        at = places(getattr(exact_inputs(c), field).shape)
        for value, place in zip((NAN, INF, -INF), (at[0], at[-1], at[len(at) // 2]), strict=True):
            check(name, c, dtype, backend, (field, place, value))


@pytest.mark.parametrize("pair", [(INF, INF), (INF, -INF), (-INF, -INF), (NAN, INF)], ids=str)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", SHAPES, ids=str)
def test_pairs_that_meet(c, name, pair, backend):
    """inf - inf is NaN, inf - -inf is not: x and w, then x and grad_y, then w and grad_y are poisoned together."""
    for fields in (("x", "w"), ("x", "grad_y"), ("w", "grad_y")):
        middles = [tuple(s // 2 for s in getattr(exact_inputs(c), f).shape) for f in fields]
        check(name, c, torch.float32, backend, *zip(fields, middles, pair, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_infinity_times_zero(name, backend):
    """Infinite grad_y times a clamp or difference of 0 is NaN, and so is zero grad_y times an infinite difference."""
    for c in SHAPES:
        inputs = exact_inputs(c)
        middle = {f: tuple(s // 2 for s in getattr(inputs, f).shape) for f in ("x", "w", "grad_y")}
        level = ("x", None, 1.0), ("w", None, 1.0)
        check(name, c, torch.float32, backend, *level, ("grad_y", middle["grad_y"], INF))
        for field in ("x", "w"):
            for value in (INF, NAN):
                check(name, c, torch.float32, backend, ("grad_y", None, 0.0), (field, middle[field], value))


@pytest.mark.slow
@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
@pytest.mark.parametrize("name, field", OPERANDS)
def test_everything_poisoned(name, field, value, backend):
    for c in SHAPES:
        check(name, c, torch.float32, backend, (field, None, value))


@pytest.mark.parametrize("name", PASSES)
def test_nothing_is_left_behind(name, backend):
    """The workspace is reused: a call full of NaN must not affect the next one."""
    for c in [*SHAPES, *SELECTED]:
        clean = exact_inputs(c)
        dirty = poisoned(clean, *((field, None, NAN) for field in ("x", "w", "grad_y", "bias")))
        compute(name, c, dirty.to(torch.float32, backend.device))
        assert_same(
            compute(name, c, clean.to(torch.float32, backend.device)), exact_result(name, c).float(), f"{name} of {c!r}"
        )


@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
def test_bias(value, backend):
    for c in SHAPES:
        check("forward", c, torch.float32, backend, ("bias", (c.C_out - 1,), value))
