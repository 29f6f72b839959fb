r"""L_mid of PKKD (arXiv 2009.13044, section 3.1): the inner layers of student and teacher matched through kernels.

.. math:: g = \exp(Y / 2\sigma_a^2), \quad h = \exp(-(x*f) / 2\sigma_c^2), \quad
          L_{mid} = \sum_{layers} \lVert \rho(g; W_a) - \rho(h; W_c) \rVert^2

What the paper leaves open is settled here, see docs/reproduce.md: the widths follow the mean |output| of each
batch, and a BatchNorm follows each 1x1 convolution rho; the literal form diverges or collapses.
"""

import math

import torch
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.moments import moments

FEATURES = ("none", "1x1", "kernel", "kernel+1x1")
WIDTHS = ("batch", "learned", "fixed")
TEACHER_LINEARS = ("trained", "identity", "random")
MID_NORMS = ("batchnorm", "none")
MID_REDUCTIONS = ("mean", "sum")

# 2 sigma^2 in units of mean |output|.  A convolution's output has both signs, so h may exceed 1: the wider kernel keeps
# it below about e.
STUDENT_FACTOR, TEACHER_FACTOR = 1.0, 3.0
BATCHNORM_EPS = 1e-5


class KernelWidths(nn.Module):
    r"""The widths :math:`2\sigma^2` of one network's kernels, for all layers.

    Args:
        layers: number of layers.
        factor: of the mean |output|.
        source: 'batch': factor * mean |output| of each batch, without gradient; 'fixed': that of the first batch;
            'learned': starts as fixed and is trained by L_mid, in the logarithm.
        shared: one width for all layers, from the mean of their mean |output|.

    Shape:
        (layers) mean |output| -> (layers) widths.
    """

    def __init__(self, layers: int, factor: float, source: str = "batch", shared: bool = False) -> None:
        super().__init__()
        self.factor, self.source, self.shared = factor, source, shared
        if source != "batch":
            log_width = nn.Parameter(torch.full((1 if shared else layers,), torch.nan))
            self.log_width = log_width.requires_grad_(source == "learned")

    def forward(self, magnitudes: Tensor) -> Tensor:
        # the floor serves a layer whose outputs are all zero
        widths = (self.factor * (magnitudes.mean(0, keepdim=True) if self.shared else magnitudes)).clamp(min=1e-12)
        if self.source != "batch":
            with torch.no_grad():  # NaN until the first batch
                self.log_width.copy_(torch.where(self.log_width.isnan(), widths.log(), self.log_width))
            widths = self.log_width.exp()
        return widths.expand(len(magnitudes))


class LayerMatch(nn.Module):
    r"""The term of one layer in L_mid: the mean over channels and pixels of :math:`(y_a - y_c)^2`.

    .. math:: y_a = BN(W_a g), \quad y_c = BN(W_c h)

    computed from means and covariances (`adderops.distill.moments`).  The BatchNorms have no parameters and use the
    statistics of the batch: with a free W and nothing behind it, W = 0 would be the trivial optimum.  Without
    kernel, g and h are the outputs in units of their width.

    Args:
        channels: of the layer's output.
        kernel, linear: whether there is a kernel and a 1x1 convolution.  The student's starts at the identity and
            is trained by L_mid.
        teacher_linear: the teacher's 1x1 convolution: 'trained' likewise, 'identity', or 'random' (orthogonal), fixed.
        norm: 'batchnorm', or 'none' for the literal form.
    """

    def __init__(self, channels: int, kernel: bool, linear: bool, teacher_linear: str, norm: str) -> None:
        super().__init__()
        self.kernel, self.norm = kernel, norm
        w_c = torch.eye(channels)
        if linear and teacher_linear == "random":
            nn.init.orthogonal_(w_c)
        self.w_a = nn.Parameter(torch.eye(channels), requires_grad=linear)
        self.w_c = nn.Parameter(w_c, requires_grad=linear and teacher_linear == "trained")

    def forward(self, student: Tensor, teacher: Tensor, widths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the layer's term and numbers to watch.

        Args:
            student, teacher: outputs (N, C, H, W).
            widths: (2), 2 sigma^2 of student and teacher.
        """
        scales = torch.stack([1 / widths[0], -1 / widths[1] if self.kernel else 1 / widths[1]])
        centres = (math.exp(-1 / STUDENT_FACTOR), 1.0) if self.kernel else (-1 / STUDENT_FACTOR, 0.0)
        mean, second = moments(student, teacher, scales, centres, self.kernel)
        mean, second = global_mean(mean, len(student)), global_mean(second, len(student))
        cov, c = second - torch.outer(mean, mean), len(self.w_a)
        mixed_a = self.w_a @ cov[:c]
        var_a = (mixed_a[:, :c] * self.w_a).sum(1).clamp(min=0)
        cov_ac = (mixed_a[:, c:] * self.w_c).sum(1)
        var_c = ((self.w_c @ cov[c:, c:]) * self.w_c).sum(1).clamp(min=0)
        if self.norm == "batchnorm":
            inv_a, inv_c = (var_a + BATCHNORM_EPS).rsqrt(), (var_c + BATCHNORM_EPS).rsqrt()
            squares = var_a * inv_a.square() + var_c * inv_c.square() - 2 * cov_ac * inv_a * inv_c
        else:
            means = self.w_a @ (mean[:c] + centres[0]) - self.w_c @ (mean[c:] + centres[1])
            squares = var_a + var_c - 2 * cov_ac + means.square()
        return squares.mean(), {"var_yc": var_c.detach().mean(), "width_a": widths[0], "width_c": widths[1]}


class FeatureMatch(nn.Module):
    r"""L_mid over all matched layers.

    Args:
        channels: of each layer's output.
        features: '1x1', 'kernel' or 'kernel+1x1': what stands between outputs and comparison.
        width: see `KernelWidths`.
        shared_width: one width for all layers of a network.
        teacher_linear, norm: see `LayerMatch`.
        reduction: 'mean' over layers, channels and pixels; 'sum' over them, and the mean over the images.

    Source: PKKD, arXiv 2009.13044, section 3.1.

    >>> match = FeatureMatch([3])
    >>> l_mid, watched = match([-torch.rand(4, 3, 8, 8) * 100], [torch.randn(4, 3, 8, 8)])
    >>> l_mid.shape, sorted(watched)
    (torch.Size([]), ['l_mid', 'var_yc', 'width_a', 'width_c'])
    """

    def __init__(
        self,
        channels: list[int],
        features: str = "kernel+1x1",
        width: str = "batch",
        shared_width: bool = False,
        teacher_linear: str = "trained",
        norm: str = "batchnorm",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        kernel, linear = "kernel" in features, "1x1" in features
        self.reduction = reduction
        self.layers = nn.ModuleList(LayerMatch(c, kernel, linear, teacher_linear, norm) for c in channels)
        self.widths = nn.ModuleList(
            KernelWidths(len(channels), factor, width, shared_width) for factor in (STUDENT_FACTOR, TEACHER_FACTOR)
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns L_mid and, of each layer, its term, the variance of y_c and the widths, (layers) each.

        Args:
            student, teacher: outputs (N, C, H, W) of each layer; those of the teacher get no gradient.
        """
        student, teacher = ([_not_half(output) for output in outputs] for outputs in (student, teacher))
        with torch.no_grad():
            magnitudes = torch.stack([torch.stack([_mean_abs(y) for y in outputs]) for outputs in (student, teacher)])
            magnitudes = global_mean(magnitudes, len(student[0]))
        widths = torch.stack([w(m) for w, m in zip(self.widths, magnitudes, strict=True)])
        terms, watched = [], []
        for i, layer in enumerate(self.layers):
            term, numbers = layer(student[i], teacher[i], widths[:, i])
            terms.append(term * student[i][0].numel() if self.reduction == "sum" else term)
            watched.append(numbers)
        of_layers = {name: torch.stack([w[name].detach() for w in watched]) for name in watched[0]}
        stacked = torch.stack(terms)
        return stacked.sum() if self.reduction == "sum" else stacked.mean(), {"l_mid": stacked.detach(), **of_layers}


def _not_half(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_abs(x: Tensor) -> Tensor:
    # image by image: sums of fewer numbers round less, and their order does not depend on the number of threads
    return torch.linalg.vector_norm(x, 1, dim=(1, 2, 3)).mean() / x[0].numel()
