"""The losses of PKKD (arXiv 2009.13044, Algorithm 1) as functions of tensors and one side branch per layer.

Two choices are not in the paper; without them training diverges or the loss collapses to zero:
the width of the kernels follows the mean |output| of each batch, and a BatchNorm follows each 1x1 convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Ten times the mean |output| is reached only where something has gone wrong; exp() must not overflow there.
MAX_EXPONENT = 10.0


def kernel_width(output: Tensor, factor: float) -> Tensor:
    r"""Returns the width of a kernel, :math:`2\sigma^2 = factor \cdot mean|output|`, one number, without gradient.

    >>> kernel_width(torch.tensor([-2.0, 4.0]), factor=3.0)
    tensor(9.)
    """
    # the floor serves a layer whose outputs are all zero
    return (factor * output.detach().abs().mean()).clamp(min=1e-12)


def gaussian_kernel(exponent: Tensor) -> Tensor:
    """Returns exp(exponent), the exponent clamped to +-10, where the gradient ends."""
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


class KernelBranch(nn.Module):
    r"""Side branch of one matched layer: kernel, 1x1 convolution, BatchNorm.

    .. math:: y = BN(\rho(\exp(s \cdot output / 2\sigma^2); W)),  \quad 2\sigma^2 = factor \cdot mean|output|

    The 1x1 convolution rho starts at the identity.  BatchNorm has no parameters and uses the statistics of the batch:
    with a free W and nothing behind it, W = 0 would be the trivial optimum of the loss.

    Args:
        channels: of the layer's output.
        sign: s = +1 for an adder layer, whose output is minus a distance; -1 for a convolution.
        factor: of the width.

    Shape:
        (N, channels, H, W) -> (N, channels, H, W).

    Source: PKKD, arXiv 2009.13044, section 3.1.
    """

    def __init__(self, channels: int, sign: float, factor: float) -> None:
        super().__init__()
        self.sign = sign
        self.factor = factor
        self.linear = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.linear.weight)
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)

    def transform(self, output: Tensor) -> Tensor:
        """Returns the branch before its BatchNorm."""
        return self.linear(gaussian_kernel(self.sign * output / kernel_width(output, self.factor)))

    def forward(self, output: Tensor) -> Tensor:
        return self.norm(self.transform(output))


def adder_branch(channels: int) -> KernelBranch:
    r"""Returns the student's branch: :math:`g = \exp(Y / 2\sigma_a^2)`, :math:`2\sigma_a^2 = mean|Y|`."""
    return KernelBranch(channels, sign=1.0, factor=1.0)


def conv_branch(channels: int) -> KernelBranch:
    r"""Returns the teacher's branch: :math:`h = \exp(-(x*f) / 2\sigma_c^2)`, :math:`2\sigma_c^2 = 3\,mean|x*f|`.

    A convolution's output has both signs, so h may exceed 1: the wider kernel keeps it below about e.
    """
    return KernelBranch(channels, sign=-1.0, factor=3.0)


def mid_loss(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    r"""Returns :math:`L_{mid}`: the mean over layers of the mean squared difference over elements.

    Args:
        student_features, teacher_features: one (N, C, H, W) per layer, y_a and y_c of the paper.

    Raises:
        ValueError: different numbers of layers.

    >>> mid_loss([torch.zeros(1, 1, 1, 2)], [torch.tensor([[[[1.0, 3.0]]]])])
    tensor(5.)
    """
    layers = [F.mse_loss(y_a, y_c) for y_a, y_c in zip(student_features, teacher_features, strict=True)]
    return torch.stack(layers).mean()


def imitation_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Returns :math:`CE(student, softmax(teacher))`, the mean over the batch; the teacher gets no gradient.

    Args:
        student_logits, teacher_logits: (N, classes).

    >>> imitation_loss(torch.zeros(1, 2), torch.tensor([[9.0, 5.0]]))
    tensor(0.6931)
    """
    return F.cross_entropy(student_logits, teacher_logits.detach().softmax(1))
