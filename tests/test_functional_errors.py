"""The argument rules of `adderops.functional.adder_conv2d`: those of `F.conv2d`, and clear errors."""

import re

import pytest
import torch
import torch.nn.functional as F

from adderops import reference
from adderops.functional import adder_conv2d

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
    "groups float": ((X, W), dict(groups=2.0), TypeError, "groups", "an integer", "float"),
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
    "input array": ((X.numpy(), W), {}, TypeError, "input", "a tensor", "ndarray"),
    "weight none": ((X, None), {}, TypeError, "weight", "a tensor", "NoneType"),
}
# the convolution of integers and of complex numbers exists; it takes a weight on the meta device, and larger windows
CONV2D_TAKES = (
    *("input integers", "input complex", "input bool", "weight device"),
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
        y = adder_conv2d(x.to(dtype), w, b)  # unlike dtypes are brought together here, and only here
    assert y.dtype == torch.float32
    assert torch.equal(y, adder_conv2d(x.to(dtype).float(), w, b))
    y.sum().backward()
    assert w.grad.dtype == torch.float32
