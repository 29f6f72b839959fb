"""The conversions of bfloat16 and float16: every bit pattern as input, rounding to nearest even of the output."""

import pytest
import torch
from cases import assert_same

HALVES = (torch.bfloat16, torch.float16)
POINTWISE = ([1, 1], [0, 0, 0, 0], [1, 1], 1)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def assert_bits(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Equal bits, except for the sign of zero and the payload of NaN, which the formulas leave open."""
    assert_same(got.flatten(), want, what)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", (1, 16), ids=lambda c: f"in{c}")
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_every_input_pattern_of_x(dtype, channels, memory_format, backend):
    """With w = 0 the forward is -sum|x|: every pattern comes out unchanged."""
    x = torch.zeros(1, channels, 256, 256, dtype=dtype)
    x[0, channels // 2] = every_number(dtype).view(256, 256)
    w = torch.zeros(3, channels, 1, 1, dtype=dtype)
    y = torch.ops.adderops.adder_conv2d(
        x.to(backend.device, memory_format=memory_format), w.to(backend.device), None, *POINTWISE
    )
    for m in range(3):
        assert_bits(y[0, m], -every_number(dtype).abs(), f"filter {m}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_input_pattern_of_w(dtype, backend):
    """With x = 0 the forward is -sum|w|."""
    w = every_number(dtype).view(-1, 1, 1, 1).to(backend.device)
    x = torch.zeros(1, 1, 1, 3, dtype=dtype, device=backend.device)
    y = torch.ops.adderops.adder_conv2d(x, w, None, *POINTWISE)
    assert_bits(y[0, :, 0, 1], -every_number(dtype).abs(), "w")
    wide = torch.zeros(4096, 16, 1, 1, dtype=dtype)  # packed from channel rows
    wide.view(-1)[:] = every_number(dtype)
    x = torch.zeros(1, 16, 1, 1, dtype=dtype, device=backend.device)
    y = torch.ops.adderops.adder_conv2d(x, wide.to(backend.device), None, *POINTWISE)
    sums = -wide.double().abs().sum((1, 2, 3))
    # 16 neighbouring patterns: exact in float32
    assert_bits(y, sums.float().to(dtype), "wide w")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_every_pattern_of_grad_y(dtype, sign, backend):
    """grad_y passes through grad_x if clamp(w - x) = +-1, and through grad_w if w = 0, x = +-1 and y is one pixel."""
    grad_y = every_number(dtype).view(1, 1, 256, 256).to(backend.device)
    x, w = torch.zeros_like(grad_y), torch.full((1, 1, 1, 1), 2 * sign, dtype=dtype, device=backend.device)
    got = torch.ops.adderops.adder_conv2d_grad_x(grad_y, x, w, *POINTWISE)
    assert_bits(got, sign * every_number(dtype), "grad_x")
    filters = every_number(dtype).view(1, -1, 1, 1).to(backend.device)
    x = torch.full((1, 1, 1, 1), sign, dtype=dtype, device=backend.device)
    got = torch.ops.adderops.adder_conv2d_grad_w(
        filters, x, torch.zeros(2**16, 1, 1, 1, dtype=dtype, device=backend.device), *POINTWISE
    )
    assert_bits(got, sign * every_number(dtype), "grad_w")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_rounding_of_the_sum(dtype, memory_format, backend):
    """-(|a| + |b|) with b a fraction of an ulp of a lies between two numbers of the dtype: ties go to even."""
    numbers = every_number(dtype)
    numbers = numbers[numbers.isfinite()].abs().unique()
    numbers = torch.cat((numbers, numbers.new_zeros(-len(numbers) % 256)))
    ulp = torch.nextafter(numbers, torch.full_like(numbers, torch.inf)).double() - numbers.double()
    for part in (0.5, 0.25, 0.75):
        b = (part * ulp.where(ulp.isfinite(), 0)).to(dtype)
        exact = numbers.double() + b.double()
        # the reference rounds once, from a float32 that holds the sum
        representable = exact.float().double() == exact
        want = -exact.float().to(dtype)
        x = torch.stack((numbers, b)).view(1, 2, -1, 256).contiguous(memory_format=memory_format)
        got = torch.ops.adderops.adder_conv2d(
            x.to(backend.device), x.new_zeros(1, 2, 1, 1).to(backend.device), None, *POINTWISE
        )
        assert representable.float().mean() > 0.9
        assert_bits(got.cpu().flatten()[representable], want[representable], f"{part} ulp")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_overflow_and_subnormal_results(dtype, backend):
    """Sums beyond the largest number become infinite; tiny products round to zero or to the smallest subnormal."""
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    x = torch.tensor([largest, largest, largest / 2, largest], dtype=dtype).view(1, 2, 1, 2).to(backend.device)
    w = torch.zeros(1, 2, 1, 1, dtype=dtype, device=backend.device)
    y = torch.ops.adderops.adder_conv2d(x, w, None, *POINTWISE).flatten().cpu()
    assert y.tolist() == [-torch.inf, -torch.inf], y
    grad_y = every_number(dtype)[every_number(dtype).isfinite()].view(1, -1, 1, 1).to(backend.device)
    x = torch.full((1, 1, 1, 1), least, dtype=dtype, device=backend.device)
    got = torch.ops.adderops.adder_conv2d_grad_w(
        grad_y, x, torch.zeros(grad_y.size(1), 1, 1, 1, dtype=dtype, device=backend.device), *POINTWISE
    )
    want = grad_y.cpu().flatten().float() * x.cpu().flatten().float()
    assert_bits(got, want.to(dtype), "grad_w")
