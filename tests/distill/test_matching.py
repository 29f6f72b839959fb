"""L_mid against its formula written out in float64: value and gradients, for all features."""

import re

import pytest
import torch
from torch import Tensor

from adderops.distill import FeatureMatch
from adderops.distill.methods.matching import BATCHNORM_EPS, STUDENT_FACTOR, TEACHER_FACTOR

CHANNELS = 5
# per image and as one matrix; one pixel; one image; channels_last
SHAPES = {"large": (3, 8, 9), "small": (4, 3, 2), "pixel": (16, 1, 1), "one image": (1, 9, 8)}


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)
    torch.manual_seed(0)


def adder_like(n: int, h: int, w: int, channels: int = CHANNELS) -> Tensor:
    """Outputs like an adder layer's: minus a few hundred."""
    return -(torch.rand(n, channels, h, w, dtype=torch.float64) * 300 + 100)


def conv_like(n: int, h: int, w: int, channels: int = CHANNELS) -> Tensor:
    return torch.randn(n, channels, h, w, dtype=torch.float64) * 2


def written_out(y: Tensor, c: Tensor, match: FeatureMatch, features: str, widths) -> Tensor:
    """The formula with all tensors at their full size; `widths` of student and teacher."""
    [linear] = match.linears
    compared = []
    for output, width, sign, weight in ((y, widths[0], 1, linear.w_a[0]), (c, widths[1], -1, linear.w_c[0])):
        feature = (sign * output / width).exp() if "kernel" in features else output / width
        feature = torch.einsum("dc,nchw->ndhw", weight, feature)
        mean = feature.mean((0, 2, 3), keepdim=True)
        variance = (feature - mean).square().mean((0, 2, 3), keepdim=True)
        compared.append((feature - mean) / (variance + BATCHNORM_EPS).sqrt())
    return (compared[0] - compared[1]).square().mean()


def make_match(features: str = "kernel+1x1") -> FeatureMatch:
    match = FeatureMatch([CHANNELS], features).double()
    for weight in (match.linears[0].w_a, match.linears[0].w_c):
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    return match


def batch_widths(y: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return STUDENT_FACTOR * y.detach().abs().mean(), TEACHER_FACTOR * c.abs().mean()


def assert_matches_formula(match: FeatureMatch, y: Tensor, c: Tensor, features: str = "kernel+1x1") -> None:
    """Value and all gradients; some hundred roundings of float64, on numbers up to 1e4 times the result."""
    trained = [y, *(p for p in match.parameters() if p.requires_grad)]
    l_mid, _ = match([y], [c])
    expected = written_out(y, c, match, features, batch_widths(y, c))
    torch.testing.assert_close(l_mid, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, trained) for loss in (l_mid, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_formula_in_every_layout(shape, channels_last):
    y, c = adder_like(*SHAPES[shape]), conv_like(*SHAPES[shape])
    if channels_last:
        y, c = (t.to(memory_format=torch.channels_last) for t in (y, c))
    assert_matches_formula(make_match(), y.requires_grad_(), c)


def test_layouts_of_student_and_teacher_may_differ():
    y, c = adder_like(3, 8, 9), conv_like(3, 8, 9).to(memory_format=torch.channels_last)
    assert_matches_formula(make_match(), y.requires_grad_(), c)
    y, c = y.detach().to(memory_format=torch.channels_last), c.contiguous()
    assert_matches_formula(make_match(), y.requires_grad_(), c)


@pytest.mark.parametrize("features", ["1x1", "kernel", "kernel+1x1"])
def test_formula_for_all_features(features):
    assert_matches_formula(make_match(features), adder_like(3, 4, 2).requires_grad_(), conv_like(3, 4, 2), features)


def test_which_1x1_is_trained():
    for features in ("1x1", "kernel", "kernel+1x1"):
        [layer] = FeatureMatch([CHANNELS], features).linears
        for matrices in (layer.w_a, layer.w_c):
            assert torch.equal(matrices[0], torch.eye(CHANNELS)) and matrices.requires_grad == (features != "kernel")


def test_maps_between_widths_start_orthogonal():
    """To the width of the narrower layer, whose own map starts at the identity."""
    for channels in ((3, 7), (7, 3)):
        [layer] = FeatureMatch([channels]).linears
        for matrices, c in ((layer.w_a, channels[0]), (layer.w_c, channels[1])):
            assert matrices.shape == (1, 3, c)
            torch.testing.assert_close(matrices[0] @ matrices[0].T, torch.eye(3))
            assert torch.equal(matrices[0], torch.eye(3, c)) == (c == 3)


def test_widths_follow_the_batch():
    y, c, match = adder_like(3, 4, 2), conv_like(3, 4, 2), make_match()
    first = batch_widths(y, c)
    for scale in (1, 3):
        _, watched = match([scale * y], [scale * c])
        found = [watched["width_a"].item(), watched["width_c"].item()]
        assert found == pytest.approx([scale * w.item() for w in first])
    assert not list(match.buffers()), "no state"


def test_batch_width_gets_no_gradient():
    """assert_matches_formula holds the width constant; with its gradient, the student's would differ."""
    y, c = adder_like(3, 4, 2).requires_grad_(), conv_like(3, 4, 2)
    match = make_match()
    through_width = written_out(y, c, match, "kernel+1x1", [y.abs().mean(), batch_widths(y, c)[1]])
    [with_width] = torch.autograd.grad(through_width, y)
    [ours] = torch.autograd.grad(match([y], [c])[0], y)
    # the BatchNorm takes nearly all of it away, yet far more is left than the roundings of float64
    assert (ours - with_width).norm() > 1e-4 * ours.norm()


def test_teacher_gets_no_gradient():
    y, c = adder_like(3, 4, 2).requires_grad_(), conv_like(3, 4, 2).requires_grad_()
    make_match()([y], [c])[0].backward()
    assert c.grad is None and y.grad is not None


def test_layers_are_averaged_for_any_size_and_order():
    shapes = [(2, 3, 4, 4), (2, 7, 1, 1), (2, 3, 2, 2)]  # layers of one size are computed together
    ys, cs = [adder_like(n, h, w, c) for n, c, h, w in shapes], [conv_like(n, h, w, c) for n, c, h, w in shapes]
    both, watched = FeatureMatch([3, 7, 3]).double()(ys, cs)
    alone = [FeatureMatch([y.size(1)]).double()([y], [c])[0].item() for y, c in zip(ys, cs, strict=True)]
    assert watched["l_mid"].tolist() == pytest.approx(alone)
    assert both.item() == pytest.approx(sum(alone) / 3)


@pytest.mark.parametrize("channels", [(3, 7), (7, 3)])
def test_formula_for_pairs_of_different_channels(channels):
    match = FeatureMatch([channels]).double()
    for weight in (match.linears[0].w_a, match.linears[0].w_c):
        torch.nn.init.normal_(weight)
    y, c = adder_like(5, 4, 3, channels[0]).requires_grad_(), conv_like(5, 4, 3, channels[1])
    assert_matches_formula(match, y, c)


def test_gradients_of_layers_of_any_order_and_size():
    """In float64 by the definition and in float32 by the kernels: those of each layer alone, a third each."""
    shapes = [(4, 3, 5, 4), (4, 7, 1, 3), (4, 3, 2, 2)]
    ys, cs = [adder_like(n, h, w, c) for n, c, h, w in shapes], [conv_like(n, h, w, c) for n, c, h, w in shapes]
    alone = []
    for y, c in zip(ys, cs, strict=True):
        y = y.clone().requires_grad_()
        alone += torch.autograd.grad(FeatureMatch([y.size(1)]).double()([y], [c])[0] / 3, y)
    # float32 rounds z at 2^-24; a BatchNorm of few pixels magnifies that by mean / deviation, about 5
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = [y.to(dtype, copy=True).requires_grad_() for y in ys]
        l_mid, _ = FeatureMatch([3, 7, 3]).to(dtype)(leaves, [c.to(dtype) for c in cs])
        for ours, theirs in zip(torch.autograd.grad(l_mid, leaves), alone, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_watched_variance_is_that_of_the_teachers_features():
    y, c = adder_like(3, 4, 2), conv_like(3, 4, 2)
    match = make_match()
    _, watched = match([y], [c])
    feature = torch.einsum("dc,nchw->ndhw", match.linears[0].w_c[0], (-c / batch_widths(y, c)[1]).exp())
    assert watched["var_yc"].item() == pytest.approx(feature.var((0, 2, 3), correction=0).mean().item())


def test_scaling_both_1x1_does_not_shrink_the_loss():
    """The BatchNorm after it excludes the trivial optimum W = 0."""
    y, c, match = adder_like(8, 4, 4), conv_like(8, 4, 4), FeatureMatch([CHANNELS]).double()
    before = match([y], [c])[0].item()
    with torch.no_grad():
        for weight in (match.linears[0].w_a, match.linears[0].w_c):
            weight *= 0.5
    # exact but for the eps = 1e-5 of BatchNorm next to variances of 0.5^2 * 0.01 and more
    assert match([y], [c])[0].item() == pytest.approx(before, rel=2e-2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("n, channels, side", [(64, 16, 32), (128, 120, 1)])
def test_float32_loses_no_digits(n, channels, side, channels_last):
    """Outputs that vary by 1 % about a large mean, as in deep adder layers: the squares are sums of centred numbers."""
    y = -500 + 5 * torch.randn(n, channels, side, side, dtype=torch.float64)
    c = conv_like(n, side, side, channels)
    if channels_last:
        y, c = (t.to(memory_format=torch.channels_last) for t in (y, c))
    match, grads, values = FeatureMatch([channels]), [], []
    for dtype in (torch.float64, torch.float32):
        output = y.detach().to(dtype, copy=True).requires_grad_()
        l_mid, _ = match.to(dtype)([output], [c.to(dtype)])
        l_mid.backward()
        grads.append(output.grad.double())
        values.append(l_mid.item())
    # y itself, rounded to float32, moves z = y / mean by 2^-24 of 100 deviations: 6e-6 of one; twice that for the width
    assert values[1] == pytest.approx(values[0], rel=2e-5)
    assert (grads[1] - grads[0]).norm() < 2e-5 * grads[0].norm()


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30])
def test_extreme_outputs_stay_finite(value):
    output = torch.full((2, CHANNELS, 3, 3), value, requires_grad=True)
    match = FeatureMatch([CHANNELS])
    l_mid, watched = match([output], [output.detach()])
    l_mid.backward()
    assert l_mid.isfinite() and output.grad.isfinite().all()
    assert all(numbers.isfinite().all() for numbers in watched.values())


def test_an_outlier_of_the_teacher_is_clamped():
    y, c = adder_like(8, 8, 8), conv_like(8, 8, 8)
    c[0, 0, 0, 0] = -1e5  # a hundred widths: its kernel would be e^100
    match = FeatureMatch([CHANNELS]).double()
    _, watched = match([y], [c])
    assert watched["var_yc"].item() < (2.7**10) ** 2


def test_halves_are_matched_in_float32():
    y, c = adder_like(3, 4, 2).float().requires_grad_(), conv_like(3, 4, 2).to(torch.bfloat16)
    l_mid, _ = FeatureMatch([CHANNELS])([y], [c])
    l_mid.backward()
    assert l_mid.dtype == torch.float32 and y.grad.dtype == torch.float32


def test_halves_are_read_as_they_are_and_autocast_changes_nothing():
    y, c = adder_like(3, 4, 2).to(torch.bfloat16), conv_like(3, 4, 2).to(torch.bfloat16)
    match, found = make_match().float(), []
    for dtype, amp in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
        output = y.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", enabled=amp):
            l_mid, _ = match([output], [c.to(dtype)])
        [grad] = torch.autograd.grad(l_mid, output)
        assert grad.dtype == dtype
        found.append((l_mid.item(), grad.to(torch.bfloat16)))
    for l_mid, grad in found[1:]:
        assert l_mid == found[0][0] and torch.equal(grad, found[0][1])


def test_outputs_that_do_not_fit_are_refused():
    match, y = FeatureMatch([3]), torch.zeros(2, 3, 4, 4)
    for role, outputs in (("teacher", (y, y[:1])), ("student", (y[:, :2], y)), ("teacher", (y, y[0]))):
        got = outputs[role == "teacher"].shape
        with pytest.raises(
            ValueError, match=re.escape(f"{role}: expected an output of shape (2, 3, H, W), got {tuple(got)}")
        ):
            match(*([output] for output in outputs))
