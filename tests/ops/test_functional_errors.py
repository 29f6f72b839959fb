"""The argument rules of `adderops.functional.adder_conv2d`: those of `F.conv2d`, and clear errors."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adderops import AdderConv2d, reference
from adderops.functional import adder_conv2d, adder_conv2d_int8, adder_linear, quantize

X_SHAPE, W_SHAPE = (2, 4, 9, 11), (6, 4, 3, 2)

# keyword arguments, and the same as the four sides, strides and dilations of the definition
ACCEPTED = {
    "defaults": ({}, {}),
    "integers": (dict(stride=2, padding=1, dilation=2), dict(stride=(2, 2), padding=(1, 1, 1, 1), dilation=(2, 2))),
    "pairs": (
        dict(stride=(1, 3), padding=(2, 0), dilation=(2, 1)),
        dict(stride=(1, 3), padding=(2, 2, 0, 0), dilation=(2, 1)),
    ),
    "lists": (dict(stride=[2, 1], padding=[0, 1]), dict(stride=(2, 1), padding=(0, 0, 1, 1))),
    "sequences of one": (dict(stride=(2,), padding=[1], dilation=(1,)), dict(stride=(2, 2), padding=(1, 1, 1, 1))),
    "valid": (dict(padding="valid", stride=2), dict(stride=(2, 2))),
    # width 2 needs one column of padding: F.conv2d puts it on the right
    "same": (dict(padding="same"), dict(padding=(1, 1, 0, 1))),
    "same dilated": (dict(padding="same", dilation=(2, 3)), dict(padding=(2, 2, 1, 2), dilation=(2, 3))),
}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_arguments_mean_what_they_mean_in_conv2d(name, batched, bias):
    arguments, geometry = ACCEPTED[name]
    # integers: every result is exact, so equality is the test
    x = torch.randint(-9, 10, X_SHAPE).double()
    w = torch.randint(-9, 10, W_SHAPE).double()
    b = torch.randint(-9, 10, W_SHAPE[:1]).double() if bias else None
    expected = reference.adder_conv2d(x, w, b, **geometry)
    if not batched:
        x, expected = x[0], expected[0]
    y = adder_conv2d(x, w, b, **arguments)
    assert y.shape == F.conv2d(x, w, b, **arguments).shape
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64], ids=lambda kind: kind.__name__)
def test_integers_of_numpy(kind):
    x, w = torch.randint(-9, 10, X_SHAPE).double(), torch.randint(-9, 10, (6, 2, 3, 2)).double()
    numpy = dict(stride=kind(2), padding=(kind(1), 1), dilation=[kind(1), kind(2)], groups=kind(2))
    python = dict(stride=2, padding=1, dilation=(1, 2), groups=2)
    assert F.conv2d(x, w, **numpy).shape == F.conv2d(x, w, **python).shape
    assert torch.equal(adder_conv2d(x, w, **numpy), adder_conv2d(x, w, **python))
    layer = AdderConv2d(4, 6, (kind(3), 2), **numpy)
    assert torch.equal(layer(x.float()), adder_conv2d(x.float(), layer.weight, **python))
    bytes = quantize(x.float(), 0.5, kind(3), kind(100))
    assert torch.equal(bytes, quantize(x.float(), 0.5, 3, 100))
    options = dict(zero_point=kind(3), quant_max=kind(100), padding_value=kind(3), groups=kind(2), padding=kind(1))
    of_python = {name: int(value) for name, value in options.items()}
    scale, offset = torch.full((6,), 0.01), torch.full((6,), 90.0)
    arguments = bytes, w.abs().byte(), scale, offset
    assert torch.equal(
        adder_conv2d_int8(*arguments, dtype=torch.uint8, **options),
        adder_conv2d_int8(*arguments, dtype=torch.uint8, **of_python),
    )


FLOATS = torch.zeros(1, 2, 3, 3)
BYTES, PER_FILTER = FLOATS.byte(), torch.zeros(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: quantize(FLOATS, None), TypeError, "quantize: scale: expected a number, got None"),
        (lambda: quantize(FLOATS, "0.1"), TypeError, "quantize: scale: expected a number, got '0.1'"),
        (lambda: quantize(FLOATS, [0.1]), TypeError, r"quantize: scale: expected a number, got \[0.1\]"),
        (lambda: quantize(FLOATS, True), TypeError, "quantize: scale: expected a number, got True"),
        (lambda: quantize(FLOATS, torch.ones(2)), TypeError, "quantize: scale: expected a number, got tensor"),
        (lambda: quantize(FLOATS, math.nan), ValueError, "quantize: scale: expected a positive number .*, got nan"),
        (lambda: quantize(FLOATS, math.inf), ValueError, "quantize: scale: expected a positive number .*, got inf"),
        (
            lambda: quantize(FLOATS, 1, 1.0),
            TypeError,
            "quantize: zero_point: expected an integer from 0 to 255, got 1.0",
        ),
        (
            lambda: quantize(FLOATS, 1, 256),
            ValueError,
            "quantize: zero_point: expected an integer from 0 to 255, got 256",
        ),
        (
            lambda: quantize(FLOATS, 1, 0, True),
            TypeError,
            "quantize: quant_max: expected an integer from 1 to 255, got Tr",
        ),
        *(
            (
                lambda r=r: adder_conv2d_int8(BYTES, BYTES[:, :, :1], PER_FILTER[:1], PER_FILTER[:1], None, r),
                error,
                f"adder_conv2d_int8: residual_scale: expected a {kind}number, got",
            )
            for r, error, kind in (
                ([], TypeError, ""),
                (None, TypeError, ""),
                ("1", TypeError, ""),
                (math.nan, ValueError, "finite "),
                (-math.inf, ValueError, "finite "),
            )
        ),
        (
            lambda: adder_conv2d_int8(BYTES, BYTES, PER_FILTER[:1], PER_FILTER[:1], relu=1),
            TypeError,
            "adder_conv2d_int8: relu: expected a bool, got 1",
        ),
        (lambda: adder_linear(FLOATS, FLOATS), ValueError, "adder_linear: weight: expected shape .out_features, in_f"),
        (
            lambda: adder_linear(FLOATS, PER_FILTER[None]),
            ValueError,
            r"adder_linear: input: expected shape \(\*, 2\), got",
        ),
        (
            lambda: adder_linear(PER_FILTER, PER_FILTER[None], PER_FILTER),
            ValueError,
            "adder_linear: bias: expected shape",
        ),
        (lambda: adder_linear(BYTES, PER_FILTER), TypeError, "adder_linear: input: expected dtype float32"),
    ],
)
def test_the_other_functions_name_their_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("shape", [(0, 4, 9, 11), (3, 4, 3, 2)], ids=["empty batch", "one pixel out"])
def test_edge_sizes(shape):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(W_SHAPE, requires_grad=True)
    y = adder_conv2d(x, w)
    assert y.shape == F.conv2d(x, w).shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape
    if shape[0] == 0:
        assert not w.grad.any()


def test_geometry_positions_and_groups():
    x, w = torch.randint(-9, 10, X_SHAPE).double(), torch.randint(-9, 10, (6, 2, 3, 2)).double()
    y = adder_conv2d(x, w, None, (2, 1), (1, 0), (1, 2), 2)
    assert torch.equal(y, reference.adder_conv2d(x, w, None, (2, 1), (1, 1, 0, 0), (1, 2), 2))


X, W, B = torch.zeros(X_SHAPE), torch.zeros(W_SHAPE), torch.zeros(6)

# what is wrong: (positional and keyword arguments, exception, argument named, expected, got)
REFUSED = {
    "stride zero": ((X, W), dict(stride=0), ValueError, "stride", "at least 1", "0"),
    "stride negative": ((X, W), dict(stride=(1, -2)), ValueError, "stride", "at least 1", "(1, -2)"),
    "stride triple": ((X, W), dict(stride=(1, 1, 1)), ValueError, "stride", "pair of integers", "(1, 1, 1)"),
    "stride float": ((X, W), dict(stride=1.5), TypeError, "stride", "pair of integers", "1.5"),
    "stride none": ((X, W), dict(stride=None), TypeError, "stride", "pair of integers", "None"),
    "dilation zero": ((X, W), dict(dilation=(0, 1)), ValueError, "dilation", "at least 1", "(0, 1)"),
    "padding negative": ((X, W), dict(padding=-1), ValueError, "padding", "at least 0", "-1"),
    "padding empty": ((X, W), dict(padding=()), ValueError, "padding", "pair of integers", "()"),
    "stride huge": ((X, W), dict(stride=2**31), ValueError, "stride", "up to 2^31 - 1", "2147483648"),
    "padding huge": ((X, W), dict(padding=(0, 2**40)), ValueError, "padding", "up to 2^31 - 1", "(0, 1099511627776)"),
    "dilation beyond any": ((X, W), dict(dilation=10**30), ValueError, "dilation", "up to 2^31 - 1", f"{10**30}"),
    "same beyond any": (
        (X, torch.zeros(6, 4, 4, 4)),
        dict(padding="same", dilation=2**31 - 1),
        ValueError,
        "dilation",
        "at most 2^32 - 1 pixels across",
        "(2147483647, 2147483647)",
    ),
    "padding word": ((X, W), dict(padding="full"), ValueError, "padding", "'same' or 'valid'", "'full'"),
    "same with stride": (
        (X, W),
        dict(padding="same", stride=2),
        ValueError,
        "stride",
        "1 with padding='same'",
        "(2, 2)",
    ),
    "groups of input": ((X, W), dict(groups=3), ValueError, "groups", "divisor of C_in = 4 and C_out = 6", "3"),
    "groups of output": ((X, W), dict(groups=4), ValueError, "groups", "divisor of C_in = 4 and C_out = 6", "4"),
    "groups zero": ((X, W), dict(groups=0), ValueError, "groups", "positive divisor", "0"),
    "groups float": ((X, W), dict(groups=2.0), TypeError, "groups", "an integer", "2.0"),
    "groups bool": ((X, W), dict(groups=True), TypeError, "groups", "an integer", "True"),
    "stride bool": ((X, W), dict(stride=True), TypeError, "stride", "pair of integers", "True"),
    "padding bool": ((X, W), dict(padding=True), TypeError, "padding", "pair of integers", "True"),
    "channels": ((X, W[:, :3]), {}, ValueError, "weight", "C_in/groups = 4 input channels", "(6, 3, 3, 2)"),
    "channels of groups": ((X, W), dict(groups=2), ValueError, "weight", "C_in/groups = 2 input", "(6, 4, 3, 2)"),
    "kernel too high": ((X[:, :, :2], W), {}, ValueError, "weight", "padded input in height", "3 > 2"),
    "kernel too wide": ((X, W), dict(dilation=(1, 11)), ValueError, "weight", "padded input in width", "12 > 11"),
    "input 2-D": ((X[0, 0], W), {}, ValueError, "input", "shape (N, C_in, H, W)", "(9, 11)"),
    "weight 3-D": ((X, W[0]), {}, ValueError, "weight", "shape (C_out, C_in/groups, KH, KW)", "(4, 3, 2)"),
    "weight empty": ((X, W[:, :, :0]), {}, ValueError, "weight", "without zeros", "(6, 4, 0, 2)"),
    "bias shape": ((X, W, B[:5]), {}, ValueError, "bias", "shape (6,)", "(5,)"),
    "bias 2-D": ((X, W, B[None]), {}, ValueError, "bias", "shape (6,)", "(1, 6)"),
    "input integers": ((X.int(), W.int()), {}, TypeError, "input", "dtype float32, float64", "torch.int32"),
    "input bool": ((X.bool(), W.bool()), {}, TypeError, "input", "dtype float32, float64", "torch.bool"),
    "input complex": ((X.cfloat(), W.cfloat()), {}, TypeError, "input", "dtype float32, float64", "torch.complex64"),
    "weight dtype": ((X, W.double()), {}, TypeError, "weight", "dtype of input, torch.float32", "torch.float64"),
    "bias dtype": ((X, W, B.half()), {}, TypeError, "bias", "dtype of input, torch.float32", "torch.float16"),
    "weight device": ((X, W.to("meta")), {}, ValueError, "weight", "device of input, cpu", "meta"),
    "meta dtypes": (
        (X.to("meta"), W.to("meta").double()),
        {},
        TypeError,
        "weight",
        "dtype of input, torch.float32",
        "torch.float64",
    ),
    "input array": ((X.numpy(), W), {}, TypeError, "input", "a tensor", "ndarray"),
    "weight none": ((X, None), {}, TypeError, "weight", "a tensor", "NoneType"),
}
# the convolution of integers and of complex numbers exists; it takes a weight on the meta device, and larger windows
CONV2D_TAKES = (
    *("input integers", "input complex", "input bool", "weight device", "meta dtypes"),
    *("stride huge", "same beyond any"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_named(name):
    positional, keywords, error, argument, expected, got = REFUSED[name]
    if name not in CONV2D_TAKES:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            F.conv2d(*positional, **keywords)
    pattern = f"adder_conv2d: {argument}: expected .*{re.escape(expected)}.*, got {re.escape(got)}$"
    with pytest.raises(error, match=pattern):
        adder_conv2d(*positional, **keywords)


def test_double_backward_is_refused():
    x, w = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(3, 2, 3, 3, requires_grad=True)
    for leaf, operator in ((x, "adder_conv2d_grad_x"), (w, "adder_conv2d_grad_w")):
        (grad,) = torch.autograd.grad(adder_conv2d(x, w).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{operator}: expected .* got .*second derivative is not defined"):
            grad.sum().backward()


def test_only_the_needed_gradients_are_computed():
    x, w, b = torch.randn(X_SHAPE), torch.randn(W_SHAPE), torch.randn(6)
    for needed in range(3):
        leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((x, w, b))]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            adder_conv2d(*leaves).sum().backward()
        ran = {event.key for event in profile.key_averages()}
        assert ("adderops::adder_conv2d_grad_x" in ran) == (needed == 0)
        assert ("adderops::adder_conv2d_grad_w" in ran) == (needed == 1)
        assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


def test_bias_gradient_is_the_sum():
    x, w, b = torch.randn(X_SHAPE), torch.randn(W_SHAPE), torch.randn(6, requires_grad=True)
    y = adder_conv2d(x, w, b)
    grad_y = torch.randint(-9, 10, y.shape).float()
    y.backward(grad_y)
    assert torch.equal(b.grad, grad_y.sum((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_float32(dtype):
    x, w, b = torch.randn(X_SHAPE), torch.randn(W_SHAPE, requires_grad=True), torch.randn(6)
    with torch.autocast("cpu", dtype=dtype):
        y = adder_conv2d(x.to(dtype), w, b)  # different dtypes are converted here, and only here
    assert y.dtype == torch.float32
    assert torch.equal(y, adder_conv2d(x.to(dtype).float(), w, b))
    y.sum().backward()
    assert w.grad.dtype == torch.float32
