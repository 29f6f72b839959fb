"""Transformations of torch.func give what a loop over the samples gives, or are refused; never a silent wrong value."""

import copy
from itertools import product

import pytest
import torch
from cases import assert_same, case, exact_inputs, one_thread, quarters
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from adderops import AdderConv2d, AdderLinear, _ops, reference
from adderops.functional import adder_conv2d, adder_conv2d_int8, adder_linear, quantize

SAMPLES = 3
ONE_GROUP = case("one group", (2, 4, 6, 5), 6, (3, 2), stride=(1, 2), padding=(1, 0, 2, 1), dilation=(2, 1))
GROUPS = case("groups", (2, 4, 5, 6), 6, (2, 3), stride=(2, 1), padding=(0, 1, 1, 2), groups=2)


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield


def of_samples(shape: tuple[int, ...], dim: int | None) -> torch.Tensor:
    """Random multiples of 1/4 for one sample or, stacked in dimension `dim`, for all samples."""
    return quarters(*shape) if dim is None else quarters(*shape[:dim], SAMPLES, *shape[dim:])


def batched(*choices: tuple) -> list[tuple]:
    """All in_dims of the choices but the one without a batched tensor."""
    return [dims for dims in product(*choices) if any(dim is not None for dim in dims)]


def assert_like_a_loop(function, tensors: list, in_dims: tuple) -> None:
    got = vmap(function, in_dims)(*tensors)
    for i in range(SAMPLES):
        sample = [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)]
        assert_same(got[i], function(*sample), f"sample {i}, in_dims={in_dims}")


@pytest.mark.parametrize("c", (ONE_GROUP, GROUPS), ids=str)
@pytest.mark.parametrize("in_dims", batched((None, 0, 2), (None, 0, 4), (None, 1)), ids=str)
def test_vmap_of_the_convolution(c, in_dims):
    tensors = [of_samples(s, dim) for s, dim in zip((c.x_shape, c.w_shape, (c.C_out,)), in_dims, strict=True)]
    assert_like_a_loop(lambda x, w, b: _ops.adder_conv2d(x, w, b, *c.geometry), tensors, in_dims)


@pytest.mark.parametrize("c", (ONE_GROUP, GROUPS), ids=str)
@pytest.mark.parametrize("op", (_ops.adder_conv2d_grad_x, _ops.adder_conv2d_grad_w), ids=("grad_x", "grad_w"))
@pytest.mark.parametrize("in_dims", batched((None, 1), (None, 3), (None, 0)), ids=str)
def test_vmap_of_the_gradients(op, c, in_dims):
    tensors = [of_samples(s, dim) for s, dim in zip((c.y_shape, c.x_shape, c.w_shape), in_dims, strict=True)]
    assert_like_a_loop(lambda g, x, w: op(g, x, w, *c.geometry), tensors, in_dims)


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("in_dims", [(0, None, None, None), (None, 1, None, 0), (None, None, 1, None), (2, 0, 0, 1)])
def test_vmap_of_bytes(in_dims, groups):
    shapes = (2, 4, 5, 6), (6, 4 // groups, 3, 3), (6,), (2, 6, 3, 4)

    x, w, scale, residual = ((16 * of_samples(n, dim)).abs().byte() for n, dim in zip(shapes, in_dims, strict=True))
    scale = scale / 512

    def layer(x, w, scale, residual):
        return adder_conv2d_int8(x, w, scale, 2 * scale, residual, 0.5, groups=groups, dtype=torch.uint8)

    assert_like_a_loop(layer, [x, w, scale, residual], in_dims)


def test_vmap_of_quantize():
    assert_like_a_loop(lambda x: quantize(x, 0.25, 8), [of_samples((2, 3, 4, 5), 4)], (4,))


def test_vmap_in_vmap_and_chunks():
    x, w = of_samples((2, 3, 4, 6, 6), 0), of_samples((5, 4, 3, 3), 0)
    both = vmap(vmap(adder_conv2d, (0, None)), (None, 0))(x[0], w)  # (w, x, ...)
    for i, j in product(range(SAMPLES), range(2)):
        assert_same(both[i, j], adder_conv2d(x[0, j], w[i]), f"weight {i}, images {j}")
    chunked = vmap(lambda x: adder_conv2d(x, w[0]), chunk_size=2)(x.flatten(0, 1))
    assert_same(chunked, adder_conv2d(x.flatten(0, 2), w[0]).unflatten(0, (6, 3)), "chunks")
    assert vmap(lambda x: adder_conv2d(x, w[0]))(x[:, :, 0]).shape == (SAMPLES, 2, 5, 4, 4)  # images without N


def test_vmap_without_images():
    w = torch.zeros(SAMPLES, 6, 4, 3, 3)
    assert vmap(adder_conv2d)(torch.zeros(SAMPLES, 0, 4, 5, 5), w).shape == (SAMPLES, 0, 6, 3, 3)
    assert vmap(adder_conv2d, (0, None))(torch.zeros(SAMPLES, 0, 4, 5, 5), w[0]).shape == (SAMPLES, 0, 6, 3, 3)


def test_gradients_are_the_training_gradients():
    for c in (ONE_GROUP, GROUPS):
        i = exact_inputs(c).to(torch.float32)
        want = [
            reference.adder_conv2d_grad_x(i.grad_y, i.x, i.w, *c.geometry),
            reference.adder_conv2d_grad_w(i.grad_y, i.x, i.w, *c.geometry),
            i.grad_y.sum((0, 2, 3)),
        ]

        def convolution(x, w, b, c=c):
            return _ops.adder_conv2d(x, w, b, *c.geometry)

        def loss(x, w, b, convolution=convolution, grad_y=i.grad_y):
            return (convolution(x, w, b) * grad_y).sum()

        got = {
            "grad": grad(loss, argnums=(0, 1, 2))(i.x, i.w, i.bias),
            "vjp": vjp(convolution, i.x, i.w, i.bias)[1](i.grad_y),
            # one row per output; grad_y weighs them
            "jacrev": [torch.tensordot(i.grad_y, rows, 4) for rows in jacrev(convolution, (0, 1, 2))(i.x, i.w, i.bias)],
        }
        for name, gradients in got.items():
            for what, one, other in zip("xwb", gradients, want, strict=True):
                assert_same(one, other, f"{name} of {what}, {c}")


def test_gradients_of_each_sample():
    """vmap(grad): with respect to shared weights, and of an ensemble."""
    x, w, b = of_samples((2, 4, 6, 6), 0), of_samples((6, 4, 3, 3), 0), of_samples((6,), None)
    weigh = of_samples((2, 6, 6, 6), None)

    def loss(w, b, x):
        return (adder_conv2d(x, w, b, padding=1) * weigh).sum()

    for in_dims in ((None, None, 0), (0, None, None), (0, None, 0)):
        tensors = [w if in_dims[0] == 0 else w[0], b, x if in_dims[2] == 0 else x[0]]
        for n in range(3):
            assert_like_a_loop(grad(loss, n), tensors, in_dims)
        values = vmap(grad_and_value(loss), in_dims)(*tensors)[1]
        assert values.shape == (SAMPLES,)
    # through vmap: the gradient of the sum over the samples
    total = grad(lambda w: vmap(loss, (None, None, 0))(w, b, x).sum())(w[0])
    assert_same(total, sum(grad(loss)(w[0], b, one) for one in x), "grad of vmap")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = AdderConv2d(3, 4, 3, padding=1, padding_mode="circular", eta=None)
        self.b = AdderConv2d(4, 6, 3, groups=2, stride=2, bias=True, eta=None)
        self.c = AdderLinear(6, 2, eta=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x) + 20).mean((-2, -1)))


def test_ensembles_and_samples_of_layers():
    """The recipes of PyTorch's documentation, against a loop in float64."""
    torch.manual_seed(0)
    networks = [Network().double() for _ in range(SAMPLES)]
    x = torch.randn(4, 3, 7, 7).double()
    parameters, buffers = stack_module_state(networks)
    skeleton = copy.deepcopy(networks[0]).to("meta")
    ensemble = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(ensemble, torch.stack([network(x) for network in networks]))

    network = networks[0]
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(p, image):
        return functional_call(network, p, (image[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    for i, image in enumerate(x):
        network.zero_grad()
        network(image[None]).square().sum().backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, msg=f"{name} of image {i}")


@pytest.mark.parametrize("make", (lambda: AdderConv2d(3, 4, 3, padding=1), lambda: AdderLinear(5, 4)))
def test_layers_with_a_rate(make):
    """The gradient of a layer by torch.func is that of its rate: for each sample where samples have gradients."""
    layer = make()
    shape = (SAMPLES, 2, 3, 6, 6) if isinstance(layer, AdderConv2d) else (SAMPLES, 2, 5)
    x, w = torch.randn(shape), layer.weight.detach()

    def loss(w, x):
        return functional_call(layer, {"weight": w}, (x,)).square().sum()

    assert_like_a_loop(layer, [x], (0,))
    each = vmap(grad(loss), (None, 0))(w, x)
    for i in range(SAMPLES):
        torch.testing.assert_close(each[i], grad(loss)(w, x[i]))
        assert abs(each[i].square().mean().sqrt() - 0.2) < 1e-4


def test_compiled_transformations():
    x, w = of_samples((2, 4, 6, 6), 0), of_samples((6, 4, 3, 3), None)
    each = vmap(grad(lambda w, x: adder_conv2d(x, w).square().sum()), (None, 0))
    torch.testing.assert_close(torch.compile(each, backend="aot_eager", fullgraph=True)(w, x), each(w, x))


X, W = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)
FORWARD_MODE = (
    r"adder_conv2d: {}: expected no forward mode differentiation \(jvp, jacfwd, linearize\), got a dual tensor"
)


@pytest.mark.parametrize("argument", ("x", "w", "bias"))
@pytest.mark.parametrize("requires_grad", (False, True))
def test_forward_mode_is_refused(argument, requires_grad):
    values = {"x": X, "w": W, "bias": torch.randn(4)}

    def of(value):
        tensors = {**values, argument: value}
        return adder_conv2d(tensors["x"], tensors["w"], tensors["bias"])

    value = values[argument].clone().requires_grad_(requires_grad)
    message = FORWARD_MODE.format(argument)
    for transform in (
        lambda: jvp(of, (value,), (torch.ones_like(value),)),
        lambda: jacfwd(of)(value),
        lambda: linearize(of, value),
        lambda: vmap(lambda tangent: jvp(of, (value,), (tangent,)))(torch.ones(2, *value.shape)),
        lambda: hessian(lambda v: of(v).sum())(value),
    ):
        with pytest.raises(RuntimeError, match=message.replace("adder_conv2d", "adder_conv2d(_grad_[xw])?")):
            transform()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match=message):
            of(dual)
        assert not of(value).isnan().any()  # no tangent, no refusal
    assert jvp(lambda v: (of(value).detach() * v).sum(), (torch.tensor(1.0),), (torch.tensor(1.0),))[1] != 0


def test_forward_mode_of_the_other_operators_is_refused():
    y = torch.randn(1, 4, 4, 4)
    geometry = [1, 1], [0] * 4, [1, 1], 1
    for op in (_ops.adder_conv2d_grad_x, _ops.adder_conv2d_grad_w):
        with pytest.raises(RuntimeError, match=f"{op._opname}: grad_y: expected no forward mode"):
            jvp(lambda g, op=op: op(g, X, W, *geometry), (y,), (y,))
    with pytest.raises(RuntimeError, match="adder_conv2d_int8: scale: expected no forward mode"):
        jvp(lambda a: adder_conv2d_int8(X.byte(), W.byte(), a, a), (torch.ones(4),), (torch.ones(4),))
    with pytest.raises(RuntimeError, match="adder_conv2d: x: expected no forward mode"):
        jvp(lambda x: adder_linear(x, torch.ones(2, 3)), (torch.ones(3),), (torch.ones(3),))


def test_bytes_have_no_gradient():
    scale = torch.ones(4, requires_grad=True)
    y = adder_conv2d_int8(X.byte(), W.byte(), scale, torch.ones(4))
    with pytest.raises(RuntimeError, match="adder_conv2d_int8: expected no differentiation of its result, .*inference"):
        y.sum().backward()
    assert not adder_conv2d_int8(X.byte(), W.byte(), scale, torch.ones(4), dtype=torch.uint8).requires_grad
    assert not quantize(X.clone().requires_grad_(), 0.1).requires_grad


def test_second_derivatives_are_refused():
    def loss(w):
        return adder_conv2d(X, w).square().sum()

    for transform in (
        grad(lambda w: grad(loss)(w).sum()),
        jacrev(jacrev(loss)),
        lambda w: vmap(grad(lambda w, s: grad(loss)(s * w).sum()), (None, 0))(w, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="adder_conv2d_grad_w: .*second derivative is not defined"):
            transform(W)
    w = W.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="adder_conv2d_grad_w: .*second derivative is not defined"):
        grad(loss)(w).sum().backward()  # ordinary autograd around torch.func
