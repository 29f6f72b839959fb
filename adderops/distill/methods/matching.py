r"""L_mid of PKKD (arXiv 2009.13044, section 3.1): the inner layers of student and teacher matched through kernels.

.. math:: g = \exp(Y / 2\sigma_a^2), \quad h = \exp(-(x*f) / 2\sigma_c^2), \quad
          L_{mid} = \sum_{layers} \lVert \rho(g; W_a) - \rho(h; W_c) \rVert^2

The paper leaves three things open; docs/pkkd.md has the reasons for what is chosen here.  The widths 2 sigma^2 follow
the mean \|output\| of each batch, without gradient.  A BatchNorm follows each 1x1 convolution rho; without it, the loss
diverges or collapses.  L_mid is a mean over layers, channels and pixels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.methods.moments import mean_abs, moments
from adderops.models import matched_layers

FEATURES = ("none", "1x1", "kernel", "kernel+1x1")

# 2 sigma^2 in units of mean |output|.  A convolution's output has both signs, so h may exceed 1: the wider kernel keeps
# it below about e.
STUDENT_FACTOR, TEACHER_FACTOR = 1.0, 3.0
LEAST_WIDTH = 1e-12  # for a layer whose outputs are all zero
BATCHNORM_EPS = 1e-5


class LinearMatch(nn.Module):
    r"""The part of L_mid behind the kernels, for pairs of layers with the same numbers of channels.

    .. math:: y_a = BN(W_a g), \quad y_c = BN(W_c h), \quad (y_a - y_c)^2

    Computed from means and covariances (`adderops.distill.methods.moments`).  The BatchNorms have no parameters and use
    the statistics of the batch: with a free W and nothing behind it, W = 0 would be the trivial optimum.

    W_a and W_c start at the identity.  Where the two layers differ in channels, they are rectangular, lead to the width
    of the narrower layer, and the one that changes the width starts orthogonal.

    Args:
        layers: number of pairs.
        channels: of the student's and of the teacher's layer.
        linear: whether there are 1x1 convolutions W, trained by L_mid.

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

    def forward(self, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Returns for each pair the mean square, over channels and pixels, and the mean variance of W_c h.

        Args:
            mean, second: (layers, C) and (layers, C, C), from `moments`.
        """
        c = self.w_a.size(2)
        cov = second - mean.unsqueeze(2) * mean.unsqueeze(1)
        mixed_a = self.w_a @ cov[:, :c]
        var_a = (mixed_a[..., :c] * self.w_a).sum(2).clamp(min=0)
        cov_ac = (mixed_a[..., c:] * self.w_c).sum(2)
        var_c = ((self.w_c @ cov[:, c:, c:]) * self.w_c).sum(2).clamp(min=0)
        inv_a, inv_c = (var_a + BATCHNORM_EPS).rsqrt(), (var_c + BATCHNORM_EPS).rsqrt()
        squares = var_a * inv_a.square() + var_c * inv_c.square() - 2 * cov_ac * inv_a * inv_c
        return squares.mean(1), var_c.detach().mean(1)


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
        self.indices = [[i for i, c in enumerate(self.channels) if c == size] for size in sizes]
        self.linears = nn.ModuleList(
            LinearMatch(len(indices), size, "1x1" in features)
            for indices, size in zip(self.indices, sizes, strict=True)
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns L_mid and, of each layer, its term, the variance of y_c and the widths, (layers) each.

        Args:
            student, teacher: outputs (N, C, H, W) of each layer; those of the teacher get no gradient.

        Raises:
            ValueError: outputs of another shape.
        """
        for role, outputs, i in (("student", student, 0), ("teacher", teacher, 1)):
            wrong = [tuple(o.shape) for o, c in zip(outputs, self.channels, strict=True) if o.shape[1:-2] != (c[i],)]
            if wrong:
                raise ValueError(f"FeatureMatch: {role}: expected outputs (N, C, H, W), got one of shape {wrong[0]}")
        pairs = [_same_size(_not_half(y), _not_half(c)) for y, c in zip(student, teacher, strict=True)]
        student, teacher = [y for y, _ in pairs], [c for _, c in pairs]
        images = len(student[0])
        with torch.no_grad():
            magnitudes = torch.stack([mean_abs(output) for output in (*student, *teacher)]).view(2, -1)
            magnitudes = global_mean(magnitudes, images)
            factors = magnitudes.new_tensor([[STUDENT_FACTOR], [TEACHER_FACTOR]])
            widths = (factors * magnitudes).clamp(min=LEAST_WIDTH)
        scales = 1 / widths
        centres = (-1 / STUDENT_FACTOR, 0.0)
        if self.kernel:
            scales = scales * scales.new_tensor([[1.0], [-1.0]])
            centres = (math.exp(centres[0]), math.exp(centres[1]))
        found = [
            moments(y, c, scale, centres, self.kernel) for y, c, scale in zip(student, teacher, scales.T, strict=True)
        ]
        of_groups: list[Tensor] = []
        variances_of_groups: list[Tensor] = []
        for indices, linear in zip(self.indices, self.linears, strict=True):
            mean, second = (global_mean(torch.stack([found[i][k] for i in indices]), images) for k in range(2))
            squares, var_c = linear(mean, second)
            of_groups.append(squares)
            variances_of_groups.append(var_c)
        order = torch.tensor([i for indices in self.indices for i in indices], device=scales.device).argsort()
        terms, variances = torch.cat(of_groups)[order], torch.cat(variances_of_groups)[order]
        watched = {"l_mid": terms, "var_yc": variances, "width_a": widths[0], "width_c": widths[1]}
        return terms.mean(), {name: value.detach() for name, value in watched.items()}


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


def _not_half(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
