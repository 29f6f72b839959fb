"""The int8 convolution, bit for bit: int32, float32 and uint8 outputs for every geometry, layout, option and ISA."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from cases import CASES, FORMATS, SELECTED, VIEWS, Case, assert_same, case, generator, one_thread, random_case
from slow import slow_except

from adderops import reference
from adderops.functional import adder_conv2d_int8, quantize

OP = torch.ops.adderops.adder_conv2d_int8.default
OUTPUTS = ("sums", "floats", "bytes")


@dataclass(frozen=True)
class Bytes:
    x: torch.Tensor
    w: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    residual: torch.Tensor

    def epilogue(self, output: str, seed: int = 0) -> tuple:
        """The arguments scale to padding_value of the operator; `seed` selects the options."""
        if output == "sums":
            return None, None, None, 1.0, False, False, 0, 255, seed * 37 % 256
        residual, relu = (self.residual, 0.3) if seed % 2 else (None, 1.0), seed // 2 % 2 == 1
        if seed % 4 == 3:
            residual = self.residual.float() / 8 - 20, 1.7
        return (
            self.scale,
            self.offset,
            *residual,
            relu,
            output == "bytes",
            seed * 11 % 90,
            255 - seed % 3 * 60,
            seed * 37 % 256,
        )


@cache
def inputs(case: Case) -> Bytes:
    """Bytes of every value; the outputs cover the range of uint8 and exceed it slightly."""
    g = generator(case)
    x, w, residual = (
        torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
        for shape in (case.x_shape, case.w_shape, case.y_shape)
    )
    K = case.terms["forward"]
    scale = (1 + torch.rand(case.C_out, generator=g)) * 4 / K**0.5
    return Bytes(x, w, scale, scale * 85 * K + 120, residual)


def arranged(b: Bytes, form: str) -> Bytes:
    how = FORMATS[form]
    return Bytes(how(b.x), how(b.w), b.scale, b.offset, how(b.residual))


@cache
def expected(case: Case, output: str, seed: int = 0) -> torch.Tensor:
    b = inputs(case)
    with one_thread():
        return reference.adder_conv2d_int8(b.x, b.w, *b.epilogue(output, seed), *case.geometry)


def check(case: Case, output: str, form: str, seed: int = 0) -> None:
    b = arranged(inputs(case), form)
    got = OP(b.x, b.w, *b.epilogue(output, seed), *case.geometry)
    assert_same(got, expected(case, output, seed), f"{output} of {case!r}, {form}, seed {seed}")
    assert got.is_contiguous(memory_format=torch.channels_last)


# Channel counts around byte vectors: runs of 4 and 8, depthwise vectors of 32 channels and more.
BYTE_CASES = [
    *(case(f"bytes-in{c}", (2, c, 3, 5), 9, (2, 3), padding=(0, 1)) for c in (2, 7, 8, 12, 24, 40, 2048, 2050)),
    *(case(f"bytes-1x1-in{c}", (1, c, 3, 4), 17, 1) for c in (8, 12, 20, 64)),
    *(case(f"bytes-depthwise{c}", (1, c, 6, 7), c, 3, groups=c) for c in (8, 16, 24, 32, 33, 64)),
    case("bytes-depthwise-taps", (1, 9, 20, 19), 9, (17, 16), groups=9),
    case("bytes-groups", (2, 32, 5, 6), 32, 3, groups=4),
    case("bytes-1x1-s2-groups", (1, 26, 7, 11), 72, 1, stride=(2, 3), groups=2),
]


@pytest.mark.parametrize("case", slow_except({*CASES[::3], *SELECTED, *BYTE_CASES}, [*CASES, *BYTE_CASES]), ids=str)
def test_every_geometry(case, backend):
    for form in FORMATS:
        for output in OUTPUTS:
            check(case, output, form)


def test_random_geometries(backend, set_threads):
    for seed in range(200):
        set_threads(1 + seed % 3)
        check(random_case(seed), OUTPUTS[seed % 3], list(FORMATS)[seed // 3 % 2], seed)


def test_every_option(backend):
    for c in SELECTED:
        for output in OUTPUTS:
            for seed in range(1, 9):
                check(c, output, "channels_last", seed)


def test_the_longest_sum(backend):
    """The maximum number of terms, all of them 255: the sum is just below 2^31."""
    k = (2**31 - 1) // 255
    x, w = torch.full((1, k, 1, 1), 255, dtype=torch.uint8), torch.zeros(2, k, 1, 1, dtype=torch.uint8)
    w[1] = 255
    got = adder_conv2d_int8(x, w)
    assert got.flatten().tolist() == [-255 * k, 0]
    with pytest.raises(RuntimeError, match="w: expected at most 8421504 terms"):
        adder_conv2d_int8(torch.cat((x, x[:, :1]), 1), torch.cat((w, w[:, :1]), 1))


def test_the_largest_sums_of_depthwise_layers(backend):
    """A sum of terms of 255 that exceeds 16 bits."""
    x = torch.full((1, 3, 20, 19), 255, dtype=torch.uint8)
    w = torch.zeros(3, 1, 17, 16, dtype=torch.uint8)
    assert (adder_conv2d_int8(x, w, groups=3) == -255 * 17 * 16).all()


def test_rounding_and_bounds(backend):
    """Ties go to even; values outside uint8 go to its nearest value, even those far outside int32."""
    values = [-3e38, -1e10, -0.5, 0.5, 1.5, 2.5, 3.4999998, 254.5, 255.0, 255.5, 256.0, 1e10, 3e38, float("nan")]
    x = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    w = torch.zeros(len(values), 1, 1, 1, dtype=torch.uint8)
    offset = torch.tensor(values)
    scale = torch.ones(len(values))
    got = adder_conv2d_int8(x, w, scale, offset, dtype=torch.uint8)
    assert got.flatten().tolist() == [0, 0, 0, 0, 2, 2, 3, 254, 255, 255, 255, 255, 255, 255]
    got = adder_conv2d_int8(x, w, scale, offset, dtype=torch.uint8, relu=True, zero_point=3)
    assert got.flatten().tolist() == [3, 3, 3, 3, 3, 3, 3, 254, 255, 255, 255, 255, 255, 255]
    assert_same(adder_conv2d_int8(x, w, scale, offset).flatten(), offset, "floats")
    assert_same(adder_conv2d_int8(x, w, scale, offset, relu=True).flatten(), offset.clamp(min=0), "relu")


def test_bitwise_equal_for_any_number_of_threads(backend, set_threads):
    layers = [
        case("resnet20-16", (8, 16, 32, 32), 16, 3, padding=1),
        case("resnet20-64", (16, 64, 8, 8), 64, 3, padding=1),
        case("resnet18-512", (2, 512, 7, 7), 512, 3, padding=1),
        case("resnet50-1x1-s2", (2, 256, 28, 28), 512, 1, stride=2),
        case("depthwise", (2, 96, 28, 28), 96, 3, padding=1, groups=96),
    ]
    for c in layers:
        b = arranged(inputs(c), "channels_last")
        results = []
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            results.append(OP(b.x, b.w, *b.epilogue("bytes", 3), *c.geometry))
        assert all(torch.equal(results[0], r) for r in results[1:]), str(c)


def test_a_shared_grid_gives_the_distance_of_the_floats():
    """If x = s (X - Z) and w = s (W - Z), then -sum |x - w| = s Y, padding included."""
    c = case("grid", (2, 5, 6, 7), 6, 3, padding=1)
    b, s, z = inputs(c), 0.25, 77
    x, w = (s * (t.double() - z) for t in (b.x, b.w))
    want = reference.adder_conv2d(x, w, None, *c.geometry)
    assert torch.equal(s * adder_conv2d_int8(b.x, b.w, padding=1, padding_value=z).double(), want)


@cache
def quantized(c: Case, dtype: torch.dtype) -> tuple[torch.Tensor, dict[tuple, torch.Tensor]]:
    """Numbers with ties, an infinity and a NaN; {grid: the reference's bytes}."""
    x = torch.randn(c.x_shape, generator=generator(c)) * 40
    x.view(-1)[0] = float("nan")
    x.view(-1)[-1] = float("inf")
    x = x.mul(2).round().div(2).to(dtype)
    grids = ((1.0, 0, 255), (0.37, 100, 255), (2.0, 255, 255), (5.0, 0, 15))
    with one_thread():
        return x, {grid: reference.quantize(x, *grid) for grid in grids}


@pytest.mark.parametrize("form", slow_except((*FORMATS, "sliced"), [*FORMATS, *VIEWS]))
@pytest.mark.parametrize(
    "dtype", slow_except((torch.float32,), (torch.float32, torch.bfloat16, torch.float16)), ids=str
)
def test_quantize(dtype, form, backend, set_threads):
    """Images of many sizes, in every layout."""
    for i, c in enumerate([*SELECTED, case("tall", (2, 3, 90, 80), 1), case("wide", (1, 9, 2, 2000), 1)]):
        set_threads(1 + i % 3)
        x, wanted = quantized(c, dtype)
        x = {**FORMATS, **VIEWS}[form](x)
        for grid, want in wanted.items():
            got = quantize(x, *grid)
            assert_same(got, want, f"{c!r}, {form}, {grid}")
            assert got.is_contiguous(memory_format=torch.channels_last)


WRONG_TO_QUANTIZE = {
    "integers": (dict(input=torch.ones(1, 1, 2, 2).int()), TypeError, "input: expected dtype float32, bfloat16 or"),
    "no tensor": (dict(input=1.0), TypeError, "input: expected a tensor, got float"),
    "three dimensions": (dict(input=torch.ones(1, 2, 2)), ValueError, "input: expected shape .N, C, H, W., got"),
    "scale of 0": (dict(scale=0.0), ValueError, "scale: expected a positive number .*, got 0.0"),
    "NaN": (dict(scale=float("nan")), ValueError, "scale: expected a positive number .*, got nan"),
    "zero point": (dict(zero_point=256), ValueError, "zero_point: expected an integer from 0 to 255, got 256"),
}


@pytest.mark.parametrize("changed, error, message", WRONG_TO_QUANTIZE.values(), ids=WRONG_TO_QUANTIZE)
def test_wrong_input_to_quantize(changed, error, message):
    with pytest.raises(error, match=f"quantize: {message}"):
        quantize(**{"input": torch.ones(1, 1, 2, 2), "scale": 1.0, "zero_point": 0, **changed})


def test_the_operator_quantize_refuses():
    op, x = torch.ops.adderops.quantize.default, torch.ones(1, 1, 2, 2)
    for arguments, message in (
        ((x.double(), 1.0, 0, 255), "x: expected dtype float32, bfloat16 or float16, got float64"),
        ((x[0], 1.0, 0, 255), "x: expected 4 dimensions"),
        ((x, -1.0, 0, 255), "scale: expected a positive number"),
        ((x, 1.0, 16, 15), "zero_point: expected an integer from 0 to 15, got 16"),
        ((x, 1.0, 0, 256), "quant_max: expected an integer from 1 to 255, got 256"),
    ):
        with pytest.raises(RuntimeError, match=f"quantize: {message}"):
            op(*arguments)


def test_quantize_opcheck():
    for how in FORMATS.values():
        x = how(torch.randn(2, 3, 4, 5))
        assert set(torch.library.opcheck(torch.ops.adderops.quantize.default, (x, 0.1, 7, 255)).values()) == {"SUCCESS"}


def test_empty_batch(backend):
    w = torch.ones(4, 3, 3, 3, dtype=torch.uint8)
    assert adder_conv2d_int8(torch.ones(0, 3, 5, 5, dtype=torch.uint8), w).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("output", OUTPUTS)
def test_opcheck(output):
    c = case("opcheck", (2, 6, 7, 8), 9, 3, stride=(1, 2), padding=(1, 0, 2, 1), groups=3)
    b = inputs(c)
    for form in FORMATS:
        a = arranged(b, form)
        result = torch.library.opcheck(OP, (a.x, a.w, *a.epilogue(output, 3), *c.geometry))
        assert set(result.values()) == {"SUCCESS"}, result


def test_compiled():
    c = case("compiled", (2, 8, 6, 6), 8, 3, padding=1)
    b = inputs(c)

    def block(x):
        y = adder_conv2d_int8(x, b.w, b.scale, b.offset, relu=True, dtype=torch.uint8, padding=1)
        return adder_conv2d_int8(y, b.w, b.scale, b.offset, x, 0.5, dtype=torch.uint8, padding=1)

    assert torch.equal(torch.compile(block, fullgraph=True)(b.x), block(b.x))


X, W = torch.ones(2, 4, 5, 6, dtype=torch.uint8), torch.ones(8, 4, 3, 3, dtype=torch.uint8)
A, B = torch.ones(8), torch.zeros(8)
WRONG = {
    "no tensor": (dict(input=[1]), TypeError, "input: expected a tensor, got list"),
    "float input": (dict(input=X.float()), TypeError, "input: expected dtype torch.uint8, got torch.float32"),
    "signed weight": (dict(weight=W.to(torch.int8)), TypeError, "weight: expected dtype torch.uint8, got torch.int8"),
    "double scale": (dict(scale=A.double()), TypeError, "scale: expected dtype torch.float32, got torch.float64"),
    "no batch": (dict(input=X[0]), ValueError, "input: expected shape .N, C_in, H, W., got .4, 5, 6."),
    "channels": (dict(weight=W[:, :3]), ValueError, "weight: expected C_in/groups = 4 input channels, got"),
    "scale alone": (dict(offset=None), ValueError, "offset: expected both scale and offset or neither, got one"),
    "length": (dict(offset=B[:7]), ValueError, r"offset: expected shape \(8,\), got \(7,\)"),
    "residual dtype": (
        dict(residual=X.double()),
        TypeError,
        "residual: expected dtype torch.uint8 or torch.float32, got torch.float64",
    ),
    "residual": (dict(residual=X), ValueError, r"residual: expected shape \(2, 8, 3, 4\), got \(2, 4, 5, 6\)"),
    "integers": (dict(dtype=torch.int32), ValueError, "dtype: expected torch.float32 or torch.uint8 with scale, got"),
    "bytes": (
        dict(scale=None, offset=None, dtype=torch.uint8),
        ValueError,
        "dtype: expected torch.int32 without scale, got torch.uint8",
    ),
    "relu": (dict(scale=None, offset=None, relu=True), ValueError, "scale: expected a tensor with relu or residual"),
    "zero point": (dict(zero_point=256), ValueError, "zero_point: expected an integer from 0 to 255, got 256"),
    "padding value": (dict(padding_value=-1), ValueError, "padding_value: expected an integer from 0 to 255, got -1"),
    "stride": (dict(stride=0), ValueError, "stride: expected an integer or a pair of integers, at least 1, got 0"),
    "device": (dict(weight=W.to("meta")), ValueError, "weight: expected the device of input, cpu, got meta"),
}


@pytest.mark.parametrize("changed, error, message", WRONG.values(), ids=WRONG)
def test_wrong_input(changed, error, message):
    arguments = {"input": X, "weight": W, "scale": A, "offset": B, **changed}
    with pytest.raises(error, match=f"adder_conv2d_int8: {message}"):
        adder_conv2d_int8(**arguments)


WRONG_OPERATOR_CALLS = {
    "dtype": (dict(x=X.float(), w=W.float()), "x: expected dtype uint8, got float32"),
    "two dtypes": (dict(w=W.float()), "w: expected the dtype of x, uint8, got float32"),
    "scale alone": (dict(offset=None), "offset: expected both scale and offset or neither, got one"),
    "no scale": (dict(scale=None, offset=None), "scale: expected a tensor with residual, relu or quantize, got none"),
    "scale dtype": (dict(scale=A.double()), "scale: expected dtype float32, got float64"),
    "offset shape": (dict(offset=B[:7]), r"offset: expected shape \(8\), got \(7\)"),
    "residual dtype": (
        dict(residual=torch.ones(2, 8, 3, 4).double()),
        "residual: expected dtype uint8 or float32, got float64",
    ),
    "residual shape": (dict(residual=X), r"residual: expected shape \(2, 8, 3, 4\), got \(2, 4, 5, 6\)"),
    "zero point": (dict(zero_point=-1), "zero_point: expected an integer from 0 to 255, got -1"),
    "largest byte": (dict(quant_max=0), "quant_max: expected an integer from 1 to 255, got 0"),
    "padding value": (dict(padding_value=300), "padding_value: expected an integer from 0 to 255, got 300"),
    "groups": (dict(groups=3), "groups: expected a positive divisor"),
}


@pytest.mark.parametrize("changed, message", WRONG_OPERATOR_CALLS.values(), ids=WRONG_OPERATOR_CALLS)
def test_the_operator_refuses(changed, message):
    arguments = dict(x=X, w=W, scale=A, offset=B, residual=None, residual_scale=1.0, relu=False, quantize=True)
    geometry = dict(stride=[1, 1], padding=[0] * 4, dilation=[1, 1], groups=1)
    with pytest.raises(RuntimeError, match=f"adder_conv2d_int8: {message}"):
        OP(**arguments | dict(zero_point=0, quant_max=255, padding_value=0) | geometry | changed)
