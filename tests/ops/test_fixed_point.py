"""The epilogue without floats, against hand-worked values and Python's integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch

from adderops.reference import adder_conv2d_int8, fixed_point_constants, fixed_point_epilogue

INT32 = 2**31 - 1


def column(*numbers: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """One channel of numbers."""
    return torch.tensor(numbers, dtype=dtype).view(1, 1, 1, -1)


def test_constants_by_hand():
    c, m, r = fixed_point_constants(torch.tensor([0.25, -(2.0**-32)]), torch.tensor([1.0, -0.5]), 3.0)
    assert m.tolist() == [0x4000_0000, -1]
    assert c.tolist() == [0x1_8000_0000, 0]
    assert r == 3 << 29


def test_constants_of_bytes_are_int32():
    """The largest float32 below 0.5, and below 4."""
    below = torch.tensor(0.5).nextafter(torch.tensor(0.0))
    _, m, r = fixed_point_constants(below[None], torch.zeros(1), 8 * below.item())
    assert m.item() == r == 2**31 - 2**7


@pytest.mark.parametrize(
    "sums, c, m, wanted",
    [
        # z = 10 - sum / 4, ties upwards: 9.75, 9.5, 9.25, 9, 0, -0.25, -0.5, -0.75
        ((1, 2, 3, 4, 40, 41, 42, 43), (10 << 32) + 2**31, -(1 << 30), (10, 10, 9, 9, 0, 0, 0, -1)),
        # one unit in the last place decides: z = 0.5 - 2^-32 and 0.5
        ((0, 1), 2**32 - 1, 1, (0, 1)),
        # the largest products
        ((INT32, -INT32), 2**31, INT32, (1073741823, -1073741823)),
    ],
)
def test_values_by_hand(sums, c, m, wanted):
    got = fixed_point_epilogue(column(*sums), torch.tensor([c]), torch.tensor([m]), least=-(2**31), most=INT32)
    assert got.flatten().tolist() == list(wanted)
    clamped = fixed_point_epilogue(column(*sums), torch.tensor([c]), torch.tensor([m]), least=3, most=9)
    assert clamped.flatten().tolist() == [min(max(y, 3), 9) for y in wanted]


def test_against_integers_of_any_size():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5, 4, 4)

    def numbers(bound: int, *size: int) -> torch.Tensor:
        return torch.randint(-bound, bound + 1, size, generator=generator)

    sums, c, m, r = numbers(INT32, *shape), numbers(2**56, 5), numbers(INT32, 5), int(numbers(INT32, 1))
    residual, beside = numbers(127, *shape).add(127).byte(), numbers(2**60, *shape)
    got = fixed_point_epilogue(sums, c, m, residual, r, beside, -(2**31), INT32)
    for at in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        n, co, *_ = at
        values = (sums[tuple(at)], residual[tuple(at)], beside[tuple(at)])
        total, byte, other = map(int, values)
        exact = (int(c[co]) + int(m[co]) * total + r * 8 * byte + other) // 2**32
        assert int(got[tuple(at)]) == min(max(exact, -(2**31)), INT32)


def test_it_rounds_what_the_other_epilogue_rounds():
    """Off by no more than the rounding of the constants, in fractions."""
    torch.manual_seed(0)
    x, w = torch.randint(0, 256, (2, 9, 7, 7)).byte(), torch.randint(0, 256, (40, 9, 3, 3)).byte()
    scale, residual_scale = torch.rand(40) * 0.02, 0.7311
    sums = -adder_conv2d_int8(x, w)
    offset = scale * sums.float().mean((0, 2, 3)) + 60
    residual = torch.randint(0, 256, sums.shape).byte()
    c, m, r = fixed_point_constants(-scale, offset, residual_scale)
    got = fixed_point_epilogue(sums, c, m, residual, r)
    floats = adder_conv2d_int8(x, w, scale, offset, residual, residual_scale, quantize=True)
    assert (got != floats).float().mean() < 0.005 and (got - floats.int()).abs().max() <= 1
    off = 0
    for at in torch.cartesian_prod(*map(torch.arange, sums.shape)).tolist():
        co, total, byte = at[1], int(sums[tuple(at)]), int(residual[tuple(at)])
        z = Fraction(offset[co].item()) - Fraction(scale[co].item()) * total + Fraction(residual_scale) * byte
        error = Fraction(total + 8 * byte + 1, 2**33)
        nearest = {min(max(math.floor(z + Fraction(1, 2) + e), 0), 255) for e in (-error, error)}
        assert int(got[tuple(at)]) in nearest
        off += len(nearest) > 1
    assert off < 10  # the bound is a sharp one: it leaves hardly any value open


def test_it_is_another_function_at_ties():
    """z = 0.5, 1.5, 2.5: to even in float32, upwards here."""
    x, w = column(1, 3, 5, dtype=torch.uint8), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    floats = adder_conv2d_int8(x, w, torch.tensor([-0.5]), torch.tensor([0.0]), quantize=True)
    sums = -adder_conv2d_int8(x, w)
    assert floats.flatten().tolist() == [0, 2, 2]
    c, m, _ = fixed_point_constants(torch.tensor([0.4999999]), torch.tensor([0.0]))
    assert fixed_point_epilogue(sums, c, m).flatten().tolist() == [0, 1, 2]
    c, m, _ = fixed_point_constants(torch.tensor([0.25]), torch.tensor([0.0]))
    assert fixed_point_epilogue(2 * sums, c, m).flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "a, b, residual_scale, message",
    [
        (0.5, 0.0, 0.0, "a: expected a magnitude below 0.5, got 0.5"),
        (float("nan"), 0.0, 0.0, "a: expected a magnitude below 0.5, got nan"),
        (0.1, -(2.0**24), 0.0, "b: expected a magnitude below 16777216, got 16777216.0"),
        (0.1, 0.0, -4.0, "residual_scale: expected a magnitude below 4, got 4.0"),
    ],
)
def test_constants_that_do_not_fit(a, b, residual_scale, message):
    with pytest.raises(ValueError, match=f"fixed_point_constants: {message}"):
        fixed_point_constants(torch.tensor([0.0, a]), torch.tensor([b, 1.0]), residual_scale)
