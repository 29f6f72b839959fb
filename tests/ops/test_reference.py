"""The reference definition itself: against the formulas written out as loops over single numbers, and by hand."""

import itertools
import math

import pytest
import torch
from cases import PASSES, Case, Inputs, assert_same, case, define, exact_inputs, random_case

from adderops import reference

SMALL = [
    case("pair", (2, 3, 4, 5), 2, (2, 3), padding=(1, 0)),
    case("stride", (1, 2, 5, 6), 3, 2, stride=(2, 3), padding=(1, 2)),
    case("dilation", (1, 2, 6, 7), 2, (3, 2), dilation=(2, 3), padding=(0, 1)),
    case("groups", (1, 6, 3, 4), 4, 2, groups=2, padding=1),
    case("sides", (1, 2, 3, 3), 2, 2, padding=(0, 1, 2, 3)),
    case("stride-beyond-kernel", (1, 1, 5, 5), 2, 1, stride=3),
]


def loops(name: str, c: Case, i: Inputs) -> torch.Tensor:
    """Y = bias - sum|x - w|, dX = sum dY*clamp(w - x, -1, 1), dW = sum dY*(x - w), number by number."""
    channels, filters = c.C_in // c.groups, c.C_out // c.groups
    n_y, _, oh, ow = c.y_shape
    y = i.bias.view(1, -1, 1, 1).repeat(n_y, 1, oh, ow)
    grad_x, grad_w = torch.zeros_like(i.x), torch.zeros_like(i.w)
    indices = itertools.product(
        range(c.N), range(c.C_out), range(oh), range(ow), range(channels), range(c.KH), range(c.KW)
    )
    for n, co, h, w, ci, kh, kw in indices:
        ih = h * c.stride[0] + kh * c.dilation[0] - c.padding[0]
        iw = w * c.stride[1] + kw * c.dilation[1] - c.padding[2]
        at = (n, co // filters * channels + ci, ih, iw)
        inside = 0 <= ih < c.H and 0 <= iw < c.W
        x, weight, grad_y = i.x[at].item() if inside else 0.0, i.w[co, ci, kh, kw].item(), i.grad_y[n, co, h, w].item()
        y[n, co, h, w] -= abs(x - weight)
        grad_w[co, ci, kh, kw] += grad_y * (x - weight)
        if inside:
            grad_x[at] += grad_y * min(1.0, max(-1.0, weight - x))
    return {"forward": y, "grad_x": grad_x, "grad_w": grad_w}[name]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", SMALL, ids=str)
def test_equals_loops(c, name):
    assert_same(define(name, c, exact_inputs(c)), loops(name, c, exact_inputs(c)), f"{name} of {c!r}")


@pytest.mark.parametrize("name", PASSES)
def test_equals_loops_on_random_geometries(name):
    small = [c for c in map(random_case, range(400)) if 0 < torch.Size(c.y_shape).numel() * c.terms["forward"] < 1500][
        :12
    ]
    assert len(small) == 12
    for c in small:
        assert_same(define(name, c, exact_inputs(c)), loops(name, c, exact_inputs(c)), f"{name} of {c!r}")


def test_by_hand():
    """x = 0, 3 padded left and right by a zero, w = 1, 5."""
    x, w = torch.tensor([[[[0.0, 3.0]]]]), torch.tensor([[[[1.0, 5.0]]]])
    geometry = (1, 1), (0, 0, 1, 1), (1, 1), 1
    assert reference.adder_conv2d(x, w, None, *geometry).tolist() == [[[[-6.0, -3.0, -7.0]]]]
    grad_y = torch.tensor([[[[1.0, 10.0, 100.0]]]])
    # x = 0: 1*clamp(5 - 0) + 10*clamp(1 - 0);  x = 3: 10*clamp(5 - 3) + 100*clamp(1 - 3)
    assert reference.adder_conv2d_grad_x(grad_y, x, w, *geometry).tolist() == [[[[11.0, -90.0]]]]
    # w = 1: 1*(0 - 1) + 10*(0 - 1) + 100*(3 - 1);  w = 5: 1*(0 - 5) + 10*(3 - 5) + 100*(0 - 5)
    assert reference.adder_conv2d_grad_w(grad_y, x, w, *geometry).tolist() == [[[[189.0, -525.0]]]]


def test_the_training_gradients_are_not_the_derivative():
    """`torch.autograd.gradcheck` does not apply to this operator: both gradients differ from the derivative on purpose.

    The derivative holds signs; the training gradients hold clamp(w - x) and x - w, which agree in sign alone.
    """
    x = torch.tensor([[[[0.25, 3.0]]]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[[[0.75]]]], dtype=torch.float64, requires_grad=True)
    y = -(x - w).abs()
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    one, geometry = torch.ones_like(y), ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert dx.tolist() == [[[[1.0, -1.0]]]] and dw.item() == 0.0
    assert reference.adder_conv2d_grad_x(one, x, w, *geometry).tolist() == [[[[0.5, -1.0]]]]
    assert reference.adder_conv2d_grad_w(one, x, w, *geometry).item() == 1.75
    assert not torch.autograd.gradcheck(
        lambda x: torch.ops.adderops.adder_conv2d(x, w.detach(), None, *map(list, geometry[:3]), 1),
        (x,),
        raise_exception=False,
    )


# --- L_mid ---


def test_moments_are_the_formula_and_its_derivative():
    """Of single numbers: z of each pixel; and the gradient by differences, in float64."""
    torch.manual_seed(0)
    y, c = -torch.rand(2, 1, 1, 2, dtype=torch.float64), torch.rand(2, 2, 1, 2, dtype=torch.float64)
    scales, centres = torch.tensor([[2.0], [-0.5]], dtype=torch.float64), (0.3, 1.1)
    z = [
        [math.exp(2 * y[n, 0, 0, p]) - 0.3, *(math.exp(-0.5 * c[n, k, 0, p]) - 1.1 for k in range(2))]
        for n, p in itertools.product(range(2), range(2))
    ]
    second = [sum(pixel[j] * pixel[k] for pixel in z) / 4 for j, k in itertools.product(range(3), range(3))]
    mean = [sum(pixel[k] for pixel in z) / 4 for k in range(3)]
    found = reference.kernel_moments([y], [c], scales, *centres, True)
    assert found.tolist() == pytest.approx([*second, *mean], rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda y: reference.kernel_moments([y], [c], scales, *centres, True), y.requires_grad_()
    )


def test_the_gradient_above_the_clamp_is_the_one_at_it():
    y, c, scales = torch.full((1, 1, 1, 1), 12.0), torch.zeros(1, 1, 1, 1), torch.ones(2, 1)
    [grad] = reference.kernel_moments_grad(torch.tensor([0.0, 0, 0, 0, 1, 0]), [y], [c], scales, 0, 0, True)
    assert grad.item() == pytest.approx(math.exp(10), rel=1e-6)


def test_terms_of_l_mid_and_their_gradients_are_those_of_autograd():
    """Two groups, one of them rectangular; some variances are negative, so clamped."""
    torch.manual_seed(0)
    eps, groups = 1e-5, []
    for layers, rows, a, c in ((2, 3, 3, 4), (1, 2, 2, 2)):
        cov = torch.randn(layers, a + c, a + c, dtype=torch.float64)
        weights = (torch.randn(layers, rows, channels, dtype=torch.float64) for channels in (a, c))
        groups.append([tensor.requires_grad_() for tensor in (cov + cov.mT, *weights)])
    given = [(w_a @ cov[:, : w_a.size(2)], w_c @ cov[:, w_a.size(2) :], w_a, w_c) for cov, w_a, w_c in groups]
    terms, variances, *gradients = reference.match_rows(*zip(*given, strict=True), eps)
    expected, of_teacher = [], []
    for layer, of_a, of_c in (one for group in groups for one in zip(*group, strict=True)):
        weights = torch.block_diag(of_a, of_c)
        cov, rows = weights @ layer @ weights.T, len(of_a)
        assert (cov.diag() < 0).any()
        var_a, var_c = (var.clamp(min=0) for var in cov.diag().split(rows))
        correlation = cov[:rows, rows:].diag() / ((var_a + eps) * (var_c + eps)).sqrt()
        expected.append((var_a / (var_a + eps) + var_c / (var_c + eps) - 2 * correlation).mean())
        of_teacher.append(var_c.mean())
    torch.testing.assert_close(terms, torch.stack(expected))
    torch.testing.assert_close(variances, torch.stack(of_teacher))
    for i, (cov, w_a, w_c) in enumerate(groups):
        by_cov, *by_weights = torch.autograd.grad(sum(expected), (cov, w_a, w_c), retain_graph=True)
        rows, *ours = gradients[3 * i : 3 * i + 3]
        torch.testing.assert_close((w_a.mT @ rows).detach(), (by_cov + by_cov.mT)[:, : w_a.size(2)])
        for a, b in zip(ours, by_weights, strict=True):
            torch.testing.assert_close(a, b)
