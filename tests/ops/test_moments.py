"""The list operators of L_mid: many layers in one call, of any sizes, types and layouts, against float64.

tests/distill/test_moments.py has single layers of every size about the kernels' tiles, and the bounds.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import FORMATS
from torch.autograd import forward_ad

from adderops import _ops, reference

HALVES = (torch.float16, torch.bfloat16)
CENTRES = (0.36787944, 1.0)
# (N, C_a, H, W), C_c
LAYERS = [((3, 5, 7, 4), 5), ((2, 33, 5, 5), 17), ((4, 1, 1, 1), 40), ((1, 16, 40, 30), 16), ((70, 8, 2, 1), 3)]


def make(dtypes=(torch.float32, torch.float32), layout="contiguous", layers=LAYERS) -> tuple:
    """Student, teacher and scales of a call."""
    generator = torch.Generator().manual_seed(0)
    student = [-(torch.rand(a, generator=generator) * 3 + 1) for a, _ in layers]
    teacher = [torch.randn((a[0], c, *a[2:]), generator=generator) for a, c in layers]
    of_layers = torch.rand(len(layers), generator=generator)
    scales = torch.stack([of_layers + 0.2, -0.3 - of_layers])
    lay_out = FORMATS[layout]
    return *([lay_out(t.to(d)) for t in ts] for ts, d in zip((student, teacher), dtypes, strict=True)), scales


def split(flat: torch.Tensor, layers=LAYERS) -> list[torch.Tensor]:
    """The (D + 1, D) of each layer."""
    channels = [a[1] + c for a, c in layers]
    parts = flat.split([(d + 1) * d for d in channels])
    return [part.view(d + 1, d) for part, d in zip(parts, channels, strict=True)]


def weights(layers=LAYERS) -> torch.Tensor:
    size = sum((a[1] + c + 1) * (a[1] + c) for a, c in layers)
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", (True, False))
@pytest.mark.parametrize("layout", FORMATS)
def test_layers_of_different_channels(backend, layout, kernel):
    """Within the bounds of tests/distill/test_moments.py, whose outputs have as many digits."""
    student, teacher, scales = make(layout=layout)
    flat, grad = _ops.kernel_moments(student, teacher, scales, *CENTRES, kernel), weights()
    gradients = _ops.kernel_moments_grad(grad, student, teacher, scales, *CENTRES, kernel)
    for i, (both, g) in enumerate(zip(split(flat), split(grad), strict=True)):
        y = student[i].double().requires_grad_()
        want = reference.kernel_moments([y], [teacher[i].double()], scales[:, i, None].double(), *CENTRES, kernel)
        [exact] = torch.autograd.grad(want, y, g.double().flatten())
        second, mean = want.view_as(both)[:-1], want.view_as(both)[-1]
        size = torch.cat([scales[0, i] * student[i], scales[1, i] * teacher[i]], 1).double()
        size = (size.exp() if kernel else size.abs()).transpose(0, 1).flatten(1) + 1
        bound = 1e-6 * (size @ size.T) / size.size(1)
        assert ((both[:-1] - second).abs() <= bound).all() and torch.equal(both[:-1], both[:-1].T)
        assert ((both[-1] - mean).abs() <= bound.diagonal()).all()
        g, c = g.double().abs(), y.size(1)
        row = (g[:-1] + g[:-1].T)[:c] @ size.amax(1) + g[-1, :c]
        bound = 4e-6 * (row * size[:c].amax(1)).max() * scales[0, i] / size.size(1)
        assert gradients[i].dtype == torch.float32 and ((gradients[i] - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", (True, False))
@pytest.mark.parametrize("dtypes", [(d, e) for d in HALVES for e in (torch.float32, d)], ids=str)
def test_halves_are_read_as_they_are(backend, dtypes, kernel):
    """To the bit what their float32 copies give; the gradient is rounded once."""
    for layout in FORMATS:
        student, teacher, scales = make(dtypes, layout)
        copies = [y.float() for y in student], [y.float() for y in teacher]
        options = (scales, *CENTRES, kernel)
        want = _ops.kernel_moments(*copies, *options)
        assert torch.equal(_ops.kernel_moments(student, teacher, *options), want)
        got = _ops.kernel_moments_grad(weights(), student, teacher, *options)
        for g, w, y in zip(got, _ops.kernel_moments_grad(weights(), *copies, *options), student, strict=True):
            assert g.dtype == y.dtype and g.stride() == y.stride() and torch.equal(g, w.to(y.dtype))
        assert torch.equal(_ops.mean_abs(student + teacher), _ops.mean_abs(copies[0] + copies[1]))


def test_a_call_for_many_layers_is_many_calls(backend):
    student, teacher, scales = make((torch.float32, torch.bfloat16))
    alone = [
        _ops.kernel_moments([a], [c], s[:, None], *CENTRES, True)
        for a, c, s in zip(student, teacher, scales.T, strict=True)
    ]
    assert torch.equal(_ops.kernel_moments(student, teacher, scales, *CENTRES, True), torch.cat(alone))
    means = torch.cat([_ops.mean_abs([a]) for a in student])
    assert torch.equal(_ops.mean_abs(student), means)


def test_mean_abs_of_any_strides(backend):
    generator = torch.Generator().manual_seed(2)
    xs = [torch.randn(s, generator=generator) for s in ((3, 5, 7, 4), (1, 1, 1, 1), (2, 33, 90, 70), (130, 2, 1, 3))]
    views = [x.transpose(1, 3) for x in xs] + [x[:, :, ::2, ::2] for x in xs] + [xs[1].expand(5, 4, 3, 2)]
    for dtype in (torch.float32, *HALVES):
        tensors = [x.to(dtype) for x in xs] + [x.to(dtype) for x in views]
        exact = torch.stack([x.double().abs().mean() for x in tensors])
        assert ((_ops.mean_abs(tensors) - exact).abs() <= 1e-6 * exact).all()


def groups() -> list[tuple[torch.Tensor, ...]]:
    """mixed_a, mixed_c, w_a and w_c of each group; one row has no variance, two a negative one."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for layers, rows, c_a, c_c in ((2, 5, 5, 5), (1, 1, 1, 1), (3, 17, 40, 17), (1, 33, 33, 64)):
        z = torch.randn((layers, 3 * (c_a + c_c), c_a + c_c), generator=generator)
        cov = z.transpose(1, 2) @ z / z.size(1)
        w_a, w_c = (torch.randn((layers, rows, c), generator=generator) for c in (c_a, c_c))
        w_a[0, 0] = 0
        mixed_a, mixed_c = w_a @ cov[:, :c_a], w_c @ cov[:, c_a:]
        if rows > 2:
            mixed_a[-1, 1] = -mixed_a[-1, 1]
            mixed_c[-1, 2] = -mixed_c[-1, 2]
        found.append((mixed_a, mixed_c, w_a, w_c))
    return found


def test_match_rows(backend):
    """Terms and derivatives by autograd in float64; the rows where a variance is clamped among them."""
    eps, given = 1e-5, groups()
    terms, var_c, *rest = _ops.match_rows(*(list(lists) for lists in zip(*given, strict=True)), eps)
    terms, var_c = (t.split([group[0].size(0) for group in given]) for t in (terms, var_c))
    for i, group in enumerate(given):
        mixed_a, mixed_c, w_a, w_c = (t.double() for t in group)
        c_a = w_a.size(2)
        sums = [(mixed_a[..., :c_a] * w_a), (mixed_c[..., c_a:] * w_c), (mixed_a[..., c_a:] * w_c)]
        leaves = [s.sum(2).requires_grad_() for s in sums]
        a, c = (v.clamp(min=0) for v in leaves[:2])
        inv_a, inv_c = (a + eps).rsqrt(), (c + eps).rsqrt()
        want = (a * inv_a**2 + c * inv_c**2 - 2 * leaves[2] * inv_a * inv_c).mean(1)
        g_a, g_c, g_ac = (g[..., None] for g in torch.autograd.grad(want.sum(), leaves))
        # the sums round at 2^-24 of the sum of their terms' sizes, and var + eps >= eps
        slope = sum(s.abs().sum(2) * g.abs()[..., 0] for s, g in zip(sums, (g_a, g_c, g_ac), strict=True)).sum(1)
        assert ((terms[i] - want).abs() <= 1e-5 * slope + 1e-5).all()
        assert ((var_c[i] - c.mean(1)).abs() <= 1e-6 * sums[1].abs().sum(2).mean(1)).all()
        expected = [
            torch.cat([2 * g_a * w_a, g_ac * w_c], 2),
            2 * g_a * mixed_a[..., :c_a] + g_ac * mixed_c[..., :c_a],
            2 * g_c * mixed_c[..., c_a:] + g_ac * mixed_a[..., c_a:],
        ]
        for got, exact in zip(rest[3 * i : 3 * i + 3], expected, strict=True):
            assert ((got - exact).abs() <= 2e-4 * exact.abs().amax((1, 2), keepdim=True) + 1e-6).all()


def test_a_clamped_variance_has_no_gradient(backend):
    """Bit for bit: one row, whose variance of the student is negative."""
    mixed, w = torch.tensor([[[-1.0, 0.5]]]), torch.ones(1, 1, 1)
    _, _, mix, grad_w_a, _ = _ops.match_rows([mixed], [torch.tensor([[[0.5, 2.0]]])], [w], [w], 1e-5)
    assert mix[0, 0, 0] == 0 and grad_w_a.item() == (mix[0, 0, 1] * 0.5).item()


def test_same_bits_for_any_number_of_threads(set_threads):
    student, teacher, scales = make()
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        options = (student, teacher, scales, *CENTRES, True)
        parts = [_ops.kernel_moments(*options), *_ops.kernel_moments_grad(weights(), *options)]
        parts += [_ops.mean_abs(student), *_ops.match_rows(*map(list, zip(*groups(), strict=True)), 1e-5)]
        found.append(parts)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_autograd_is_the_gradient_operator():
    student, teacher, scales = make((torch.bfloat16, torch.float32), "channels_last")
    leaves = [y.requires_grad_(i != 1) for i, y in enumerate(student)]
    grad = weights()
    _ops.kernel_moments(leaves, teacher, scales, *CENTRES, True).backward(grad)
    want = _ops.kernel_moments_grad(grad, [y.detach() for y in student], teacher, scales, *CENTRES, True)
    for i, (leaf, w) in enumerate(zip(leaves, want, strict=True)):
        assert leaf.grad is None if i == 1 else torch.equal(leaf.grad, w)


def test_what_has_no_derivative_says_so():
    student, teacher, scales = make()
    leaves = [y.requires_grad_() for y in student]
    flat = _ops.kernel_moments(leaves, teacher, scales, *CENTRES, True)
    (first, *_) = torch.autograd.grad(flat.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="_kernel_moments_grad: expected no differentiation .*second derivative"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="_mean_abs: expected no differentiation of its result"):
        _ops.mean_abs(leaves).sum().backward()
    a = [t.requires_grad_() for t in groups()[0]]
    with pytest.raises(RuntimeError, match="_match_rows: expected no differentiation of its result"):
        _ops.match_rows(*([t] for t in a), 1e-5)[0].sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="_kernel_moments: student: expected no forward"):
        dual = [forward_ad.make_dual(y.detach(), torch.ones_like(y)) for y in student]
        _ops.kernel_moments(dual, teacher, scales, *CENTRES, True)


X = torch.zeros(2, 3, 4, 4)
SCALES = torch.ones(2, 1)
W = torch.zeros(2, 3, 4)
WRONG = [
    (
        lambda: _ops.mean_abs([X, X[0]]),
        r"_mean_abs: x\[1\]: expected shape \(N, C, H, W\) without zeros, got \(3, 4, 4\)",
    ),
    (lambda: _ops.mean_abs([X[:0]]), r"_mean_abs: x\[0\]: expected shape \(N, C, H, W\) without zeros, got \(0, 3, 4"),
    (
        lambda: _ops.mean_abs([X[:1, :1, :1, :1].expand(1, 1, 2**40, 1)]),
        r"x\[0\]: expected fewer than 2\^31 - 2\^16 pixels",
    ),
    (
        lambda: _ops.kernel_moments(
            [X[:1, :1].expand(1, 1, 4, 4)], [X[:1, :1, :1, :1].expand(1, 2**30, 4, 4)], SCALES, 1, 1, True
        ),
        r"teacher\[0\]: expected fewer than",
    ),
    (lambda: _ops.mean_abs([X.double()]), r"x\[0\]: expected dtype float32, bfloat16 or float16, got float64"),
    (lambda: _ops.kernel_moments([], [], SCALES, 1, 1, True), "student: expected at least one layer, got none"),
    (
        lambda: _ops.kernel_moments([X], [X, X], SCALES, 1, 1, True),
        "teacher: expected 1 layers, as of the student, got 2",
    ),
    (
        lambda: _ops.kernel_moments([X], [X[:1]], SCALES, 1, 1, True),
        r"teacher\[0\]: expected the images and the size of",
    ),
    (lambda: _ops.kernel_moments([X], [X], SCALES.T, 1, 1, True), r"scales: expected shape \(2, 1\), got \(1, 2\)"),
    (lambda: _ops.kernel_moments([X], [X], SCALES.double(), 1, 1, True), "scales: expected dtype float32, got float64"),
    (
        lambda: _ops.kernel_moments_grad(torch.zeros(36), [X], [X], SCALES, 1, 1, True),
        r"_kernel_moments_grad: grad: expected shape \(42\), got \(36\)",
    ),
    (
        lambda: _ops.kernel_moments_grad(torch.zeros(42).half(), [X], [X], SCALES, 1, 1, True),
        "_kernel_moments_grad: grad: expected dtype float32, got float16",
    ),
    (
        lambda: _ops.match_rows([W], [W], [W], [], 1.0),
        "mixed_c, w_a, w_c: expected 1 groups, as of mixed_a, got 1, 1, 0",
    ),
    (lambda: _ops.match_rows([W], [W], [W], [W], 1.0), r"mixed_a\[0\]: expected shape \(2, 3, 8\), got \(2, 3, 4\)"),
    (
        lambda: _ops.match_rows([W], [W], [W[0]], [W], 1.0),
        r"w_a\[0\]: expected shape \(layers, rows, C\) without zeros",
    ),
    (
        lambda: _ops.match_rows([W], [W], [W[..., :1]], [W[:, :2, :3]], 1.0),
        r"w_c\[0\]: expected shape \(2, 3, 3\), got",
    ),
    (
        lambda: _ops.match_rows([W.half()], [W], [W[..., :1]], [W[..., 1:]], 1.0),
        r"mixed_a\[0\]: expected dtype float32",
    ),
]


@pytest.mark.parametrize("call, message", WRONG, ids=[message for _, message in WRONG])
def test_what_memory_safety_needs_is_checked(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("layout", FORMATS)
def test_opcheck(layout):
    student, teacher, scales = make((torch.bfloat16, torch.float32), layout)
    options = (student, teacher, scales, *CENTRES, True)
    for operator, arguments in (
        (_ops.kernel_moments, options),
        (_ops.kernel_moments, ([y.clone().requires_grad_() for y in student], *options[1:])),
        (_ops.kernel_moments_grad, (weights(), *options)),
        (_ops.mean_abs, (student + teacher,)),
        (_ops.match_rows, (*map(list, zip(*groups(), strict=True)), 1e-5)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}, operator


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    student, teacher, scales = make()
    with FlopCounterMode(display=False) as counter:
        _ops.kernel_moments([y.requires_grad_() for y in student], teacher, scales, *CENTRES, True).sum().backward()
    pixels = [a[0] * a[2] * a[3] for a, _ in LAYERS]
    forward = sum(2 * p * (a[1] + c) ** 2 for p, (a, c) in zip(pixels, LAYERS, strict=True))
    backward = sum(2 * p * a[1] * (a[1] + c) for p, (a, c) in zip(pixels, LAYERS, strict=True))
    assert counter.get_total_flops() == forward + backward


def test_of_constant_outputs_the_mean_is_exact():
    """Scales from a strided view, and a teacher that is expanded."""
    scales = torch.tensor([[0.5, 9.0, 0.25, 9.0], [2.0, 9.0, 4.0, 9.0]])[:, ::2]
    ys = [torch.full((2, 3, 2, 2), 4.0), torch.full((1, 2, 4, 4), 8.0)]
    cs = [torch.tensor(2.0).expand(2, 1, 2, 2), F.pad(torch.full((1, 2, 4, 4), 0.5), (1, 1))[..., 1:-1]]
    first, second = split(_ops.kernel_moments(ys, cs, scales, 1.0, -1.0, False), [((2, 3, 2, 2), 1), ((1, 2, 4, 4), 2)])
    assert first[-1].tolist() == [1, 1, 1, 5] and second[-1].tolist() == [1, 1, 3, 3]
    assert torch.equal(first[:-1], first[-1].outer(first[-1]))
