"""The sources of the CUDA kernels of L_mid, run on the host against float64: values, bits, order, races."""

from itertools import product

import pytest
import torch
from cases import FORMATS
from ops.test_moments import CENTRES, groups, split, weights
from slow import slow_except

from adderops import _ops, reference
from simt import builder, host
from simt.builder import ORDERS

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

TYPES = (torch.float32, torch.float16, torch.bfloat16)
SIDES, TILES = (32, 64, 128), (16, 32, 64)  # csrc/cuda/moments.cu, moments_grad.cu
# (N, C_a, H, W), C_c: channels about warps, tiles and several tiles; pixels about slabs; one of each
LAYERS = [
    ((3, 5, 7, 4), 5),
    ((1, 1, 1, 1), 1),
    ((2, 33, 5, 5), 17),
    ((1, 16, 40, 30), 16),
    ((70, 8, 2, 1), 3),
    ((2, 64, 5, 9), 64),
    ((1, 70, 9, 9), 75),
    ((2, 3, 8, 16), 130),
]


def build(variant: str = "plain") -> host.Kernels:
    return host.build(variant, host.MOMENTS)


def make(layout: str, types=(torch.float32, torch.float32), layers=LAYERS) -> tuple:
    """Student, teacher and scales; `layout` is one of FORMATS, or a view with gaps."""
    generator = torch.Generator().manual_seed(0)
    student = [-(torch.rand(a, generator=generator) * 3 + 1).to(types[0]) for a, _ in layers]
    teacher = [torch.randn((a[0], c, *a[2:]), generator=generator).to(types[1]) for a, c in layers]
    of_layers = torch.rand(len(layers), generator=generator)

    def lay_out(t: torch.Tensor) -> torch.Tensor:
        if layout in FORMATS:
            return FORMATS[layout](t)
        n, c, h, w = t.shape
        view = torch.zeros(n, w + 1, h, c + 2, dtype=t.dtype).permute(0, 3, 2, 1)[:, 1:-1, :, 1:]
        return view.copy_(t)

    scales = torch.stack([of_layers + 0.2, -0.3 - of_layers])
    return [lay_out(y) for y in student], [lay_out(y) for y in teacher], scales


def integers(layers=LAYERS, dtype=torch.float32, layout="contiguous") -> tuple:
    """Small integers, of which every sum is exact in any order."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(a, (a[0], c, *a[2:])) for a, c in layers]
    both = [[torch.randint(-3, 4, s, generator=generator).to(dtype) for s in pair] for pair in shapes]
    scales = torch.tensor([[1.0], [2.0]]).repeat(1, len(layers))
    return *([FORMATS[layout](pair[i]) for pair in both] for i in range(2)), scales


def features(y: torch.Tensor, c: torch.Tensor, scales: torch.Tensor, kernel: bool) -> torch.Tensor:
    """The sizes of z, (D, pixels), for bounds: |phi| + 1."""
    z = torch.cat([scales[0] * y.double(), scales[1] * c.double()], 1)
    return (z.clamp(max=10).exp() if kernel else z.abs()).transpose(0, 1).flatten(1) + 1


def exact_of(y: torch.Tensor, c: torch.Tensor, scales: torch.Tensor, kernel: bool) -> tuple[torch.Tensor, ...]:
    """E[z] and E[z z^T]."""
    flat = reference.kernel_moments([y], [c], scales[:, None], *CENTRES, kernel)
    both = flat.view(-1, y.size(1) + c.size(1))
    return both[-1], both[:-1]


def check_moments(kernels: host.Kernels, student, teacher, scales, kernel: bool, layers=LAYERS, **how) -> None:
    """Within the bounds of tests/ops/test_moments.py."""
    flat = kernels.moments(student, teacher, scales, *CENTRES, kernel, **how)
    for i, both in enumerate(split(flat, layers)):
        one = student[i].double(), teacher[i].double(), scales[:, i].double()
        mean, second = exact_of(*one, kernel)
        size = features(*one, kernel)
        bound = 1e-6 * (size @ size.T) / size.size(1)
        assert ((both[:-1] - second).abs() <= bound).all(), (i, how)
        assert torch.equal(both[:-1], both[:-1].T)
        assert ((both[-1] - mean).abs() <= bound.diagonal()).all(), (i, how)


def check_gradient(kernels: host.Kernels, student, teacher, scales, kernel: bool, layers=LAYERS, **how) -> None:
    """Within the bounds of tests/ops/test_moments.py, and for halves one rounding more."""
    grad = weights(layers)
    gradients = kernels.moments_grad(grad, student, teacher, scales, *CENTRES, kernel, **how)
    for i, g in enumerate(part.double() for part in split(grad, layers)):
        y, c = student[i].double().requires_grad_(), student[i].size(1)
        one = teacher[i].double(), scales[:, i].double()
        mean, second = exact_of(y, *one, kernel)
        [exact] = torch.autograd.grad((mean * g[-1]).sum() + (second * g[:-1]).sum(), y)
        size, g = features(y.detach(), *one, kernel), g.abs()
        row = (g[:-1] + g[:-1].T)[:c] @ size.amax(1) + g[-1, :c]
        bound = 4e-6 * (row * size[:c].amax(1)).max() * scales[0, i] / size.size(1)
        if student[i].dtype != torch.float32:
            bound = bound + exact.abs() * torch.finfo(student[i].dtype).eps + 1e-7
        assert gradients[i].dtype == student[i].dtype
        assert ((gradients[i].double() - exact).abs() <= bound).all(), (i, how)


def check(*arguments, **how) -> None:
    check_moments(*arguments, **how)
    check_gradient(*arguments, **how)


@pytest.mark.parametrize("kernel", (True, False))
@pytest.mark.parametrize("layout", [*FORMATS, "view"])
def test_against_float64(layout, kernel):
    """Many layers in one call, of every tile, the types from case to case."""
    for i, types in enumerate(((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2)):
        student, teacher, scales = make(layout, types)
        check(build(), student, teacher, scales, kernel, order=ORDERS[i])


@pytest.mark.parametrize("tile", range(len(SIDES)))
def test_exact_in_every_tile_layout_and_order(tile):
    """Integers: to the bit, whatever the tile, layout, type, order of threads, poison and number of splits."""
    pixels = torch.tensor([float(a[0] * a[2] * a[3]) for a, _ in LAYERS])
    want = grads = None
    for i, (layout, dtype) in enumerate(product(FORMATS, TYPES)):
        student, teacher, scales = integers(dtype=dtype, layout=layout)
        how = {"order": ORDERS[i % 3], "poison": (0xFF, 0, 0x5A)[i % 3], "multiprocessors": (1, 16, 132)[i % 3]}
        how |= {"tile": tile, "layout": i % 2 if layout == "channels_last" else -1}
        flat = build().moments(student, teacher, scales, 1.0, -2.0, False, **how)
        if want is None:
            want = torch.cat([exact_moments(*one) for one in zip(student, teacher, pixels, strict=True)])
        assert torch.equal(flat, want), how
        # scale / pixels is 1, so the sums of products are integers too
        grad = torch.randint(-2, 3, flat.shape, generator=torch.Generator().manual_seed(5)).float()
        scales = torch.stack([pixels, torch.full_like(pixels, 2.0)])
        small = [y / 8 for y in student] if dtype == torch.float32 else None
        if small is None:
            continue
        got = build().moments_grad(grad, small, teacher, scales, 1.0, -2.0, False, **how)
        if grads is None:
            of_layers = zip(split(grad, LAYERS), small, teacher, scales.T, strict=True)
            grads = [exact_gradient(*one) for one in of_layers]
        assert all(map(torch.equal, got, grads)), how


def exact_moments(y: torch.Tensor, c: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Sums in float64, then as the kernels divide: times 1 / pixels in float32."""
    z = torch.cat([y.double() - 1, 2 * c.double() + 2], 1).transpose(0, 1).flatten(1)
    both = torch.cat([z @ z.T, z.sum(1)[None]])
    return (both.float() * (1 / pixels)).flatten()


def exact_gradient(g: torch.Tensor, y: torch.Tensor, c: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    z = torch.cat([scales[0].double() * y.double() - 1, scales[1].double() * c.double() + 2], 1)
    columns = (g[:-1] + g[:-1].T)[:, : y.size(1)].double()
    grad = torch.einsum("jc,njhw->nchw", columns, z) + g[-1, : y.size(1)].double()[:, None, None]
    return grad.float()


@pytest.mark.parametrize("tile", slow_except((2,), range(len(SIDES))))
@pytest.mark.parametrize("layout", FORMATS)
def test_no_race_and_nothing_out_of_bounds(layout, tile):
    layers = [((2, 5, 3, 7), 6), ((1, 19, 4, 9), 15), *([((2, 66, 4, 5), 70)] if tile == 2 else [])]
    for i, order in enumerate(ORDERS):
        student, teacher, scales = make(layout, (TYPES[i], TYPES[-i]), layers)
        check(build("race"), student, teacher, scales, i != 1, layers, tile=tile, order=order, multiprocessors=1)


def test_lists_longer_than_a_launch():
    """Kernel arguments hold 18 or 20 layers: the numbers of the blocks start again."""
    layers = LAYERS[:5] * 9
    student, teacher, scales = make("contiguous", layers=layers)
    check(build(), student, teacher, scales, True, layers)


def test_long_sums():
    """As exact as on the CPU, whose sums are as short."""
    layers = [((2, 4, 150, 130), 4)]
    student, teacher, scales = make("contiguous", layers=layers)
    for multiprocessors in (1, 132):
        check(build(), student, teacher, scales, True, layers, multiprocessors=multiprocessors)


def test_the_exponent_is_clamped():
    """Beyond 10 the value and the gradient at 10; a NaN reaches the moments, and the gradient of its pixel."""
    y = torch.tensor([-50.0, 0.0, 9.5, 10.0, 11.0, 1e30]).view(6, 1, 1, 1)
    scales = torch.tensor([[1.0], [0.0]])
    for i, value in enumerate(y.flatten().tolist()):
        one = y[i : i + 1], torch.zeros(1, 1, 1, 1)
        flat = build().moments([one[0]], [one[1]], scales, 0.0, 0.0, True)
        want = torch.tensor(min(value, 10.0), dtype=torch.float64).exp()
        assert flat[4].item() == pytest.approx(want.item(), rel=2e-6, abs=1e-30)
        [grad] = build().moments_grad(torch.tensor([0.0, 0, 0, 0, 1, 0]), [one[0]], [one[1]], scales, 0.0, 0.0, True)
        assert grad.item() == pytest.approx(want.item(), rel=2e-6, abs=1e-30)
    y = torch.zeros(1, 2, 2, 2)
    y[0, 1, 0, 1] = float("nan")
    for kernel in (True, False):
        flat = build().moments([y], [torch.ones(1, 1, 2, 2)], scales, 0.5, 0.5, kernel).view(4, 3)
        assert flat.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False], [False, True, False]]
        [grad] = build().moments_grad(torch.ones(12), [y], [torch.ones(1, 1, 2, 2)], scales, 0.5, 0.5, kernel)
        assert grad[0, :, 0, 1].isnan().all() and grad.isnan().sum() == 2


@pytest.mark.parametrize("variant", ("plain", "race"))
def test_mean_abs(variant):
    """Dense in any order of the dimensions, with gaps, expanded, unaligned; more tensors than a launch takes."""
    generator = torch.Generator().manual_seed(2)
    shapes = ((3, 5, 7, 4), (1, 1, 1, 1), (2, 33, 30, 20), (130, 2, 1, 3))
    for i, dtype in enumerate(TYPES):
        xs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
        xs += [x.transpose(1, 3) for x in xs] + [x[:, :, ::2, ::2] for x in xs]
        xs += [xs[1].expand(5, 4, 3, 2), torch.randn(300, generator=generator).to(dtype)[3:].view(1, 1, 9, 33)]
        exact = torch.stack([x.double().abs().mean() for x in xs])
        got = build(variant).mean_abs(xs * 3, order=ORDERS[i])
        assert ((got - exact.repeat(3)).abs() <= 1e-6 * exact.repeat(3)).all()
    whole = [torch.randint(-8, 9, s, generator=generator).float() for s in shapes]
    got = build(variant).mean_abs(whole, order="random")
    assert torch.equal(got, torch.stack([x.abs().sum() / x.numel() for x in whole]))


@pytest.mark.parametrize("variant", ("plain", "race"))
def test_match(variant):
    """As the CPU's, which tests/ops/test_moments.py holds to float64: a row's sums differ in their order only."""
    given = [list(lists) for lists in zip(*(groups() * 11), strict=True)]
    want = _ops.match_rows(*given, 1e-5)
    for order in ORDERS:
        got = build(variant).match(*given, 1e-5, order=order, multiprocessors=1)
        for a, b in zip(got, want, strict=True):
            assert ((a - b).abs() <= 1e-6 * b.abs().max()).all()


def test_tiles_are_those_of_the_source():
    assert (build().tiles("moments"), build().tiles("moments_grad")) == (len(SIDES), len(TILES))
    assert f"kSides[] = {{{', '.join(map(str, SIDES))}}}" in (builder.CSRC / "cuda/moments.cu").read_text()
    chosen = ", ".join(f"{{{m}, 128}}" for m in TILES)
    assert f"kTiles[] = {{{chosen}}}" in (builder.CSRC / "cuda/moments_grad.cu").read_text()


@pytest.mark.slow
def test_sanitized():
    """AddressSanitizer and UBSan over every kernel once, in a process of their own."""
    layers = [((1, 5, 3, 7), 6), ((1, 19, 4, 5), 45), ((1, 66, 3, 5), 70)]
    calls, wanted = [], []
    for i, (layout, dtype) in enumerate(product(FORMATS, TYPES)):
        student, teacher, scales = make(layout, (dtype, TYPES[i % 2]), layers)
        options = (student, teacher, scales, *CENTRES, True)
        calls += [("moments", options, {"tile": i % 3}), ("moments_grad", (weights(layers), *options), {"tile": i % 3})]
        wanted += [build().moments(*options), build().moments_grad(weights(layers), *options)]
        calls.append(("mean_abs", (student + teacher,), {}))
        wanted.append(build().mean_abs(student + teacher))
    given = [list(lists) for lists in zip(*groups(), strict=True)]
    calls.append(("match", (*given, 1e-5), {}))
    wanted.append(build().match(*given, 1e-5))
    for got, want, (name, *_) in zip(host.run_sanitized(calls, host.MOMENTS), wanted, calls, strict=True):
        for a, b in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
            assert ((a.float() - b.float()).abs() <= 1e-2 * b.float().abs().max()).all(), name
