r"""Mean and covariance of the kernels of two layers, in one pass over their outputs.

PKKD compares a student's layer with its teacher's, each through a kernel, a 1x1 convolution and a BatchNorm.  After the
kernels z everything is linear or a function of mean and covariance, and so is the mean squared difference:

.. math:: y = W z, \quad mean(y) = W\,mean(z), \quad cov(y) = W\,cov(z)\,W^T

Therefore no tensor of the outputs' size is kept.  `adderops.distill.methods.matching` computes the loss from mean and
covariance.
"""

from typing import Any

import torch
from torch import Tensor

from adderops import _ops

# Exponents above ten widths mean that something has gone wrong.
MAX_EXPONENT = 10.0
# With fewer pixels per image, one matrix product per image costs more than a copy with the channels last.
LEAST_PIXELS = 64


def _one_matrix_per_image(x: Tensor) -> bool:
    return x.is_contiguous() and x.size(2) * x.size(3) >= LEAST_PIXELS


def _as_matrices(x: Tensor, per_image: bool) -> Tensor:
    """Returns (N, C, H, W) as (N, C, H*W), or as one matrix (1, C, N*H*W) with dense channels; a view if possible."""
    if per_image:
        return x.flatten(2)
    return x.permute(0, 2, 3, 1).reshape(1, -1, x.size(1)).transpose(1, 2)


def _as_images(matrices: Tensor, per_image: bool, shape: torch.Size) -> Tensor:
    """Inverts `_as_matrices`."""
    n, c, h, w = shape
    return matrices.reshape(shape) if per_image else matrices.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


def _features(student: Tensor, teacher: Tensor, scales: Tensor, centres: tuple[float, float], kernel: bool) -> Tensor:
    """Returns z as matrices, the student's channels first."""
    per_image = _one_matrix_per_image(student)
    n, c, p = _as_matrices(student, per_image).shape
    channels = c + teacher.size(1)
    z = student.new_empty((n, channels, p)) if per_image else student.new_empty((n, p, channels)).transpose(1, 2)
    halves = z.split([c, channels - c], dim=1)
    for half, output, scale in zip(halves, (student, teacher), scales, strict=True):
        torch.mul(_as_matrices(output, per_image), scale, out=half)
    if kernel:
        z.clamp_(max=MAX_EXPONENT).exp_()
    for half, centre in zip(halves, centres, strict=True):
        half.sub_(centre)
    return z


class _Moments(torch.autograd.Function):
    """For any device and type.  It does not save z; the backward pass computes it again."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, scales: Tensor, centres: tuple[float, float], kernel: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, teacher, scales)
        ctx.centres, ctx.kernel = centres, kernel
        z = _features(student, teacher, scales, centres, kernel)
        return z.mean((0, 2)), (z @ z.transpose(1, 2)).sum(0) / (z.size(0) * z.size(2))

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, scales = ctx.saved_tensors
        per_image = _one_matrix_per_image(student)
        z = _features(student, teacher, scales, ctx.centres, ctx.kernel)
        n, channels, p = z.shape
        c = student.size(1)
        factor, centre = scales[:1] / (n * p), ctx.centres[0]
        if ctx.kernel:
            factor = factor * centre
        matrix, vector = (grad_second + grad_second.T)[:c] * factor, grad_mean[:c, None] * factor
        grad = torch.baddbmm(vector.expand(n, c, 1), matrix.expand(n, c, channels), z)
        if ctx.kernel:
            grad.addcmul_(grad, z[:, :c], value=1 / centre)  # exp' = exp = z + centre; times centre: in the factor
        return _as_images(grad, per_image, student.shape), None, None, None, None


class _NativeMoments(torch.autograd.Function):
    """The same by the kernels of csrc: float32 on the CPU, equal numbers of channels.  No z exists in memory."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, scales: Tensor, centres: tuple[float, float], kernel: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(student, teacher)
        ctx.numbers = (*scales.tolist(), *centres, kernel)
        both = _ops.kernel_moments(student, teacher, *ctx.numbers)
        return both[-1], both[:-1]

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        c = student.size(1)
        factor = ctx.numbers[0] / (student.numel() / c)
        weights = torch.cat([(grad_second + grad_second.T)[:, :c], grad_mean[None, :c]]) * factor
        return _ops.kernel_moments_grad(weights, student, teacher, *ctx.numbers), None, None, None, None


def moments(
    student: Tensor, teacher: Tensor, scales: Tensor, centres: tuple[float, float], kernel: bool
) -> tuple[Tensor, Tensor]:
    r"""Returns E[z] (C) and E[z z^T] (C, C) over all pixels, z = [z of the student, z of the teacher].

    .. math:: z = \exp(scale \cdot output) - centre, \quad\text{or}\quad z = scale \cdot output - centre

    The exponent is clamped to at most 10; above, the gradient is the one at the bound.  (An adder layer without bias
    has exponents of at most 0.)

    Args:
        student, teacher: outputs (N, C_a, H, W) and (N, C_c, H, W) of a layer, C = C_a + C_c; the teacher gets no
            gradient.
        scales: (2), of student and teacher, not zero; they get no gradient.
        centres: of student and teacher; near the means, so that the squares lose no digits; the student's is not zero
            with the exponential.
        kernel: with or without the exponential.

    Raises:
        ValueError: student and teacher differ in N, H or W.

    >>> mean, second = moments(torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3), torch.ones(2), (0.0, 0.0), False)
    >>> mean, second
    (tensor([0., 1.]), tensor([[0., 0.],
            [0., 1.]]))
    """
    n, _, *size = student.shape
    if teacher.shape != (n, teacher.size(1), *size):
        expected = f"({n}, C, {', '.join(map(str, size))})"
        raise ValueError(f"moments: teacher: expected shape {expected}, got {tuple(teacher.shape)}")
    native = (
        student.device.type == "cpu"
        and student.dtype == teacher.dtype == torch.float32
        and student.size(1) == teacher.size(1)
    )
    function = _NativeMoments if native else _Moments
    return function.apply(student, teacher.detach(), scales.detach(), centres, kernel)


def mean_abs(x: Tensor) -> Tensor:
    """Returns mean |x| of a tensor (N, C, H, W), without gradient.

    >>> mean_abs(torch.tensor([[[[-1.0, 3.0]]]]))
    tensor(2.)
    """
    x = x.detach()
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    if dense and x.device.type == "cpu" and x.dtype == torch.float32:
        return _ops.abs_sum(x).mean() / x[0].numel()
    return x.abs().mean()
