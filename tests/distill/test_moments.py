"""The CPU kernels of L_mid against the definition in float64: every instruction set, layout and size about their tiles.

Bounds.  z is exp of a number that float32 holds to 2^-24 of at most 10, itself right to a few units: relative 1e-6 of
z + centre.  A moment is a mean of products of such numbers, summed in blocks: 1e-6 of the mean of |z_j z_k| and of the
centres' share in it.  The gradient is a sum over 2C such products.
"""

import pytest
import torch

from adderops import _ops, reference

CENTRES = (0.36787944, 1.0)
# N, C, H, W: channels about vectors and tiles of 4, 8, 16 lanes; pixels about bands; bands of rows and of images
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 5, 7),
    (2, 3, 4, 4),
    (5, 7, 3, 3),
    (2, 8, 6, 5),
    (4, 15, 2, 2),
    (2, 16, 9, 7),
    (3, 17, 8, 8),
    (130, 12, 1, 1),
    (2, 33, 5, 5),
    (1, 4, 150, 130),
    (7, 64, 16, 16),
    (40, 120, 1, 1),
]


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.zeros(x.size(0), x.size(1) + 2, x.size(2) + 1, 2 * x.size(3))
    view = wide[:, 1:-1, 1:, ::2]
    view.copy_(x)
    return {"contiguous": x, "channels_last": x.contiguous(memory_format=torch.channels_last), "view": view}


def moments(y, c, scales, centres, kernel, operators=_ops) -> tuple[torch.Tensor, torch.Tensor]:
    """E[z] and E[z z^T] of one layer."""
    both = operators.kernel_moments([y], [c], scales[:, None], *centres, kernel)
    both = both.view(-1, y.size(1) + c.size(1))
    return both[-1], both[:-1]


def make(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    y = -(torch.rand(shape, generator=generator) * 300 + 100)
    return y, torch.randn(shape, generator=generator), torch.tensor([1 / 250.0, -1 / 2.4])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_gradient(backend, shape, kernel):
    y, c, scales = make(shape)
    centres = CENTRES if kernel else (-1.0, 0.0)
    exact_y = y.double().requires_grad_()
    mean, second = moments(exact_y, c.double(), scales.double(), centres, kernel, reference)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator) for t in (mean, second)]
    loss = (mean * weights[0]).sum() + (second * weights[1]).sum()
    [exact_grad] = torch.autograd.grad(loss, exact_y)
    z = torch.cat([scales[0] * y, scales[1] * c], 1).double().flatten(2).transpose(0, 1).flatten(1)
    features = (z.exp() if kernel else z).abs()
    bound = 1e-6 * (features @ features.T / z.size(1) + features.mean(1) + features.mean(1)[:, None] + 1)
    grad_bound = (
        1e-6
        * ((weights[1] + weights[1].T).abs().sum(1)[: shape[1]].max() * features.max() + weights[0].abs().max())
        * features[: shape[1]].max()
        * scales[0].abs()
        / z.size(1)
    )
    for name, student in layouts(y).items():
        student = student.detach().requires_grad_()
        ours = moments(student, layouts(c)[name], scales, centres, kernel)
        assert ((ours[0] - mean).abs() <= bound.diagonal()).all(), name
        assert ((ours[1] - second).abs() <= bound).all(), name
        assert torch.equal(ours[1], ours[1].T)
        loss = (ours[0] * weights[0]).sum() + (ours[1] * weights[1]).sum()
        [grad] = torch.autograd.grad(loss, student)
        assert ((grad - exact_grad).abs() <= 4 * grad_bound).all(), name
        assert grad.stride() == torch.empty_like(student).stride() or name == "view"


def test_exact_on_small_integers(backend):
    """Without exponential every number is an integer of a few bits and the number of pixels a power of two."""
    generator = torch.Generator().manual_seed(0)
    y, c = (torch.randint(-3, 4, (8, 19, 4, 8), generator=generator).float() for _ in range(2))
    mean, second = moments(y, c, torch.ones(2), (1.0, -2.0), False)
    z = torch.cat([y - 1, c + 2], 1).transpose(0, 1).flatten(1).double()
    assert torch.equal(mean.double(), z.mean(1)) and torch.equal(second.double(), z @ z.T / 256)


@pytest.mark.parametrize("shape", [(16, 16, 24, 24), (64, 33, 3, 3), (3, 5, 70, 90)], ids=str)
def test_same_bits_for_any_number_of_threads(set_threads, shape):
    y, c, scales = make(shape)
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        student = y.detach().requires_grad_()
        mean, second = moments(student, c, scales, CENTRES, True)
        [grad] = torch.autograd.grad(second.sum() + mean.sum(), student)
        found.append((mean, second, grad, _ops.mean_abs([y])))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_abs(backend, shape):
    _, c, _ = make(shape)
    expected = c.double().abs().mean().item()
    for name, x in layouts(c).items():
        assert _ops.mean_abs([x]).item() == pytest.approx(expected, rel=1e-6), name


def test_exponential_over_its_whole_range(backend):
    """Second moments of single pixels are squares of exp: every exponent from the clamp below to that above."""
    exponents = torch.linspace(-40, 12, 5001)
    y = exponents.view(-1, 1, 1, 1)
    for i in range(0, 5001, 250):
        mean, _ = moments(y[i : i + 1], y[i : i + 1], torch.tensor([1.0, 1.0]), (1e-30, 1e-30), True)
        expected = exponents[i].double().clamp(max=10).exp()
        assert mean[0].item() == pytest.approx(expected.item(), rel=4e-7)


def test_only_the_student_gets_a_gradient():
    y, c, scales = make((2, 3, 4, 4))
    for dtype, operators in ((torch.float32, _ops), (torch.float64, reference)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (y, c, scales)]
        mean, _ = moments(*leaves, CENTRES, True, operators)
        mean.sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [False, True, True]
