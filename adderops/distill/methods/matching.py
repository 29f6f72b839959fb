r"""L_mid of PKKD (arXiv 2009.13044, section 3.1): the inner layers of student and teacher matched through kernels.

.. math:: g = \exp(Y / 2\sigma_a^2), \quad h = \exp(-(x*f) / 2\sigma_c^2), \quad
          L_{mid} = \sum_{layers} \lVert \rho(g; W_a) - \rho(h; W_c) \rVert^2

The paper leaves three things open; docs/pkkd.md has the reasons for what is chosen here.  The widths 2 sigma^2 follow
the mean \|output\| of each batch, without gradient.  A BatchNorm follows each 1x1 convolution rho; without it, the loss
diverges or collapses.  L_mid is a mean over layers, channels and pixels.

After the kernels z = (g, h) everything is linear or a function of mean and covariance, and so is L_mid:

.. math:: y = W z, \quad mean(y) = W\,mean(z), \quad cov(y) = W\,cov(z)\,W^T

Therefore no tensor of the outputs' size is kept.  Each operator takes the layers of a step all at once, so that their
number does not decide how many kernels a GPU has to launch; `adderops.reference` defines them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adderops import _ops, reference
from adderops.distill.distributed import global_mean
from adderops.distill.evaluate import autocast
from adderops.models import matched_layers

FEATURES = ("none", "1x1", "kernel", "kernel+1x1")

# 2 sigma^2 in units of mean |output|.  A convolution's output has both signs, so h may exceed 1: the wider kernel keeps
# it below about e.
STUDENT_FACTOR, TEACHER_FACTOR = 1.0, 3.0
LEAST_WIDTH = 1e-12  # for a layer whose outputs are all zero
BATCHNORM_EPS = 1e-5


class LinearMaps(nn.Module):
    r"""The 1x1 convolutions W_a and W_c for pairs of layers with the same numbers of channels.

    W_a and W_c start at the identity.  Where the two layers differ in channels, they are rectangular, lead to the width
    of the narrower layer, and the one that changes the width starts orthogonal.

    Args:
        layers: number of pairs.
        channels: of the student's and of the teacher's layer.
        linear: whether there are 1x1 convolutions W, trained by L_mid; otherwise W stays the identity.

    Attributes:
        w_a, w_c: (layers, width, C_a) and (layers, width, C_c).

    Raises:
        ValueError: different numbers of channels without 1x1 convolutions.
    """

    def __init__(self, layers: int, channels: tuple[int, int], linear: bool) -> None:
        super().__init__()
        of_student, of_teacher = channels
        if of_student != of_teacher and not linear:
            raise ValueError(
                f"features: expected 1x1 convolutions for layers of {of_student} and {of_teacher} channels, got none"
            )
        width = min(channels)
        w_a, w_c = (torch.eye(width, c).repeat(layers, 1, 1) for c in channels)
        for matrices in (w_a, w_c):
            if matrices.size(2) != width:
                for matrix in matrices:
                    nn.init.orthogonal_(matrix)
        self.w_a = nn.Parameter(w_a, requires_grad=linear)
        self.w_c = nn.Parameter(w_c, requires_grad=linear)


class LinearMatch(torch.autograd.Function):
    r"""What follows the kernels, for all layers.

    .. math:: y_a = BN(W_a g), \quad y_c = BN(W_c h), \quad L = mean (y_a - y_c)^2

    The BatchNorms have no parameters and use the statistics of the batch: with a free W and nothing after it, W = 0
    would be the trivial optimum.  Each row of W is a channel of y, with its variances and its covariance

    .. math:: (y_a - y_c)^2 = \frac{var_a}{var_a + eps} + \frac{var_c}{var_c + eps}
              - \frac{2\,cov_{ac}}{\sqrt{(var_a + eps)(var_c + eps)}}

    The forward pass has the gradients of these rows already.  Those by mean and covariance of z are, with m = mean(z)
    and :math:`r = [2 g_a w_a | g_{ac} w_c]` of all rows (`reference.match_rows`),

    .. math:: (G + G^T)_{a,:} = W_a^T r, \quad dL/dm_a = -(G + G^T)_{a,:}\,m

    Only the student's rows are needed: the teacher gets no gradient.

    Shapes:
        moments: flat, from `kernel_moments`, groups of layers of one size after each other; it is overwritten.
        weights: W_a and W_c of each group.

    Returns:
        L, and of each layer its term and the mean variance of W_c h, which are not differentiable.
    """

    @staticmethod
    def forward(ctx: Any, moments: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w_a, w_c, moments = weights[::2], weights[1::2], moments.detach()  # which nothing else reads
        mixed_a, mixed_c = [], []
        for (second, mean), a, c in zip(_matrices(moments, weights), w_a, w_c, strict=True):
            cov = second.baddbmm_(mean.mT, mean, alpha=-1)
            mixed_a.append(a @ cov[:, : a.size(2)])
            mixed_c.append(c @ cov[:, a.size(2) :])
        terms, variances, *gradients = _operators(moments).match_rows(mixed_a, mixed_c, w_a, w_c, BATCHNORM_EPS)
        ctx.save_for_backward(moments, *weights, *gradients)
        ctx.mark_non_differentiable(terms, variances)
        ctx.set_materialize_grads(False)
        return terms.mean(), terms, variances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        moments, *saved = ctx.saved_tensors
        groups = len(saved) // 5
        weights, gradients = saved[: 2 * groups], saved[2 * groups :]
        layers = sum(map(len, weights[::2]))
        gradients = torch._foreach_mul(gradients, grad / layers)
        rows, grad_a, grad_c = gradients[::3], gradients[1::3], gradients[2::3]
        grad_moments = torch.zeros_like(moments)
        of_groups = zip(_matrices(grad_moments, weights), _matrices(moments, weights), weights[::2], rows, strict=True)
        for (grad_second, grad_mean), (_cov, mean), w_a, row in of_groups:
            a = w_a.size(2)
            of_student = grad_second[:, :a]
            torch.bmm(w_a.mT, row, out=of_student)
            grad_mean[..., :a].baddbmm_(mean, of_student.mT, beta=0, alpha=-1)
            of_student[..., :a].mul_(0.5)  # G + G^T has this block twice, and the others once
        return grad_moments, *(g for pair in zip(grad_a, grad_c, strict=True) for g in pair)


def _matrices(moments: Tensor, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields E[z z^T] (l, D, D) and E[z] (l, 1, D) of each group of l layers; views."""
    sizes = [(len(a), a.size(2) + c.size(2)) for a, c in zip(weights[::2], weights[1::2], strict=True)]
    of_groups = moments.split([layers * (d + 1) * d for layers, d in sizes])
    for flat, (layers, d) in zip(of_groups, sizes, strict=True):
        both = flat.view(layers, d + 1, d)
        yield both[:, :d], both[:, d:]


def _operators(*tensors: Tensor) -> Any:
    """Returns the module with the operators for these tensors: there are no kernels for float64."""
    return reference if any(x.dtype == torch.float64 for x in tensors) else _ops


class FeatureMatch(nn.Module):
    r"""L_mid over all matched layers.

    Without kernel, g and h are the outputs in units of their width.  Where the two outputs of a pair differ in height
    or width, the larger is averaged over areas (adaptive average pooling) down to the smaller.

    Args:
        channels: of each pair's outputs: a number, or those of student and teacher where they differ.
        features: '1x1', 'kernel' or 'kernel+1x1': what stands between outputs and comparison.

    Raises:
        ValueError: a pair of different channels without 1x1.

    Source: PKKD, arXiv 2009.13044, section 3.1.

    >>> match = FeatureMatch([3])
    >>> l_mid, watched = match([-torch.rand(4, 3, 8, 8) * 100], [torch.randn(4, 3, 8, 8)])
    >>> l_mid.shape, sorted(watched)
    (torch.Size([]), ['l_mid', 'var_yc', 'width_a', 'width_c'])
    """

    def __init__(self, channels: Sequence[int | tuple[int, int]], features: str = "kernel+1x1") -> None:
        super().__init__()
        self.channels = [(c, c) if isinstance(c, int) else c for c in channels]
        self.kernel = "kernel" in features
        # layers of the same size together: 20 layers of small matrices would take their time one by one
        sizes = dict.fromkeys(self.channels)
        indices = [[i for i, c in enumerate(self.channels) if c == size] for size in sizes]
        self.linears = nn.ModuleList(
            LinearMaps(len(of_size), size, "1x1" in features) for of_size, size in zip(indices, sizes, strict=True)
        )
        self.order = [i for of_size in indices for i in of_size]

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns L_mid and, of each layer, its term, the variance of y_c and the widths, (layers) each.

        Args:
            student, teacher: outputs (N, C, H, W) of each layer; the teacher's get no gradient.

        Raises:
            ValueError: outputs of another shape.
        """
        images = len(student[0])
        for role, outputs, i in (("student", student, 0), ("teacher", teacher, 1)):
            for output, channels in zip(outputs, self.channels, strict=True):
                if output.shape[:-2] != (images, channels[i]):
                    expected, got = f"({images}, {channels[i]}, H, W)", tuple(output.shape)
                    raise ValueError(f"FeatureMatch: {role}: expected an output of shape {expected}, got {got}")
        pairs = [_same_size(student[i], teacher[i].detach()) for i in self.order]
        student, teacher = [y for y, _ in pairs], [c for _, c in pairs]
        operators = _operators(*student, *teacher)
        widths = self._widths(operators, student, teacher)
        scales, centres = 1 / widths, (-1 / STUDENT_FACTOR, 0.0)
        if self.kernel:
            scales[1].neg_()
            centres = (math.exp(centres[0]), math.exp(centres[1]))
        moments = operators.kernel_moments(student, teacher, scales, *centres, self.kernel)
        with autocast(moments.device, None):
            weights = [w for linear in self.linears for w in (linear.w_a, linear.w_c)]
            l_mid, terms, variances = LinearMatch.apply(global_mean(moments, images), *weights)
        watched = torch.stack([terms, variances, *widths], 1)
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        columns = torch.stack([watched[place] for place in places], 1)
        return l_mid, dict(zip(("l_mid", "var_yc", "width_a", "width_c"), columns, strict=True))

    @torch.no_grad()
    def _widths(self, operators: Any, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Returns the widths (2, layers) of student and teacher."""
        widths = global_mean(operators.mean_abs([*student, *teacher]), len(student[0])).view(2, -1)
        for width, factor in zip(widths, (STUDENT_FACTOR, TEACHER_FACTOR), strict=True):
            width.mul_(factor)
        return widths.clamp_(min=LEAST_WIDTH)


def layer_pairs(
    student: nn.Module, teacher: nn.Module, layers: Mapping[str, str] | Iterable[str] | None = None
) -> dict[str, str]:
    """Returns the layers to match: {name of the student's layer: name of the teacher's}.

    Args:
        student, teacher: the networks.
        layers: {student layer: teacher layer}, or names that both networks have.  By default the `matched_layers` of
            both in their order; where the teacher has more or fewer, each layer of the student is matched with the
            teacher's layer at the same relative depth.

    Raises:
        ValueError: a name that is not a convolution of its network, or a network without matched layers.

    >>> from adderops.models import lenet5, resnet20
    >>> layer_pairs(lenet5("adder"), resnet20("cnn"))
    {'conv2': 'layer1.0.conv1', 'conv3': 'layer2.1.conv2', 'conv4': 'layer3.2.conv2'}
    """
    if layers is not None:
        pairs = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
        if not pairs:
            raise ValueError("layers: expected at least one pair, got none; features='none' matches no layers")
        for role, network, names in (("student", student, pairs.keys()), ("teacher", teacher, pairs.values())):
            modules = dict(network.named_modules())
            for name in names:
                if not hasattr(modules.get(name), "out_channels"):
                    got = type(modules[name]).__name__ if name in modules else "no such layer"
                    raise ValueError(f"layers: expected convolutions of the {role}, got {name!r} ({got})")
        return pairs
    ours, theirs = list(matched_layers(student)), list(matched_layers(teacher))
    for role, found in (("student", ours), ("teacher", theirs)):
        if not found:
            raise ValueError(f"{role}: expected a convolution between the first and the classifier, got none")
    steps = max(len(ours) - 1, 1)
    return {name: theirs[(2 * i * (len(theirs) - 1) + steps) // (2 * steps)] for i, name in enumerate(ours)}


def pair_channels(student: nn.Module, teacher: nn.Module, pairs: Mapping[str, str]) -> list[tuple[int, int]]:
    """Returns the channels of the student's and the teacher's layer in each of `layer_pairs`."""
    return [(_channels(student, a), _channels(teacher, c)) for a, c in pairs.items()]


def _channels(network: nn.Module, layer: str) -> int:
    channels = network.get_submodule(layer).out_channels
    assert isinstance(channels, int)  # `layer_pairs` has convolutions only
    return channels


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Averages areas of the larger of two outputs, so that both have the smaller height and width."""
    size = (min(student.size(2), teacher.size(2)), min(student.size(3), teacher.size(3)))
    student, teacher = (y if y.shape[2:] == size else F.adaptive_avg_pool2d(y, size) for y in (student, teacher))
    return student, teacher
