"""The definition of the operators in plain PyTorch: slow, readable, for any floating dtype and any device.

Every backend is tested against the first three functions in float64, and against the last two bit for bit. Arguments
are those of the compiled operators: `stride` (h, w), `padding` (top, bottom, left, right), `dilation` (h, w). The
functions loop over the taps k = (ci, kh, kw), so that no temporary is larger than the output, and record no graph.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Index = tuple[Any, ...]


def _taps(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_value: int = 0,
) -> Iterator[tuple[_Index, _Index, Tensor, Tensor]]:
    """Yields (index into x, index into w, x_k, w_k) for every tap k.

    x_k (N, groups, 1, OH, OW) and w_k (groups, C_out/groups, 1, 1) broadcast to the output
    (N, groups, C_out/groups, OH, OW). The indices are for padded x, viewed as (N, groups, C_in/groups, H, W), and for
    w, viewed as (groups, C_out/groups, C_in/groups, KH, KW).
    """
    top, bottom, left, right = padding
    x = F.pad(x, (left, right, top, bottom), value=padding_value).unflatten(1, (groups, -1))
    w = w.unflatten(0, (groups, -1))
    KH, KW = w.shape[-2:]
    spans = [d * (k - 1) for d, k in zip(dilation, (KH, KW), strict=True)]
    for ci in range(w.size(2)):
        for kh in range(KH):
            for kw in range(KW):
                begin = (kh * dilation[0], kw * dilation[1])
                rows, columns = (slice(begin[i], x.size(3 + i) - spans[i] + begin[i], stride[i]) for i in range(2))
                at_x, at_w = (..., ci, rows, columns), (..., ci, kh, kw)
                yield at_x, at_w, x[at_x].unsqueeze(2), w[at_w][..., None, None]


@torch.no_grad()
def adder_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Returns Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]| (+ bias[co]); a padded tap contributes -|W[co,k]|.

    Shapes: x (N, C_in, H, W), w (C_out, C_in/groups, KH, KW), bias (C_out) -> (N, C_out, OH, OW).
    Source: AdderNet, arXiv 1912.13200, equation 2.

    >>> adder_conv2d(torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[3.0, 3.0]]]]))
    tensor([[[[-4.]]]])
    """
    y = x.new_zeros(())
    for _, _, x_k, w_k in _taps(x, w, stride, padding, dilation, groups):
        y = y - (x_k - w_k).abs()
    y = y.flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


@torch.no_grad()
def adder_conv2d_grad_x(
    grad_y: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Returns the training gradient of x: dX[k,p] = sum_co dY[co,p] * clamp(W[co,k] - X[k,p], -1, 1).

    Deliberately not the derivative, which has sgn(W - X) instead of the clamp.
    Shapes: grad_y (N, C_out, OH, OW), x (N, C_in, H, W), w (C_out, C_in/groups, KH, KW) -> (N, C_in, H, W).
    Source: AdderNet, arXiv 1912.13200, section 3.2.

    >>> adder_conv2d_grad_x(torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0, 2.5]]]]), torch.tensor([[[[3.0, 3.0]]]]))
    tensor([[[[1.0000, 0.5000]]]])
    """
    top, bottom, left, right = padding
    grad_y = grad_y.unflatten(1, (groups, -1))
    padded = F.pad(torch.zeros_like(x), (left, right, top, bottom))
    sums = padded.unflatten(1, (groups, -1))  # a view: the sums land in `padded`
    for at_x, _, x_k, w_k in _taps(x, w, stride, padding, dilation, groups):
        sums[at_x] += (grad_y * (w_k - x_k).clamp(-1, 1)).sum(2)
    return padded[:, :, top : top + x.size(2), left : left + x.size(3)].contiguous()


@torch.no_grad()
def adder_conv2d_grad_w(
    grad_y: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Returns the training gradient of w: dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k]); a padded tap has X = 0.

    Deliberately not the derivative, which has sgn(X - W) instead of the difference ("full-precision gradient").
    Shapes: grad_y (N, C_out, OH, OW), x (N, C_in, H, W), w (C_out, C_in/groups, KH, KW) -> shape of w.
    Source: AdderNet, arXiv 1912.13200, section 3.2.

    >>> adder_conv2d_grad_w(torch.ones(1, 1, 1, 1), torch.tensor([[[[1.0, 5.0]]]]), torch.tensor([[[[3.0, 3.0]]]]))
    tensor([[[[-2.,  2.]]]])
    """
    grad_y = grad_y.unflatten(1, (groups, -1))
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    sums = grad_w.unflatten(0, (groups, -1))  # a view: the sums land in `grad_w`
    for _, at_w, x_k, w_k in _taps(x, w, stride, padding, dilation, groups):
        sums[at_w] = (grad_y * (x_k - w_k)).sum((0, 3, 4))
    return grad_w


@torch.no_grad()
def adder_conv2d_int8(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    relu: bool = False,
    quantize: bool = False,
    zero_point: int = 0,
    quant_max: int = 255,
    padding_value: int = 0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Returns Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]| of uint8 tensors, int32; with `scale` and `offset`, z of it.

    z = (offset[co] + scale[co] * Y) + residual_scale * residual, in float32 and in this order. With `quantize`, z is
    rounded to the nearest integer from 0 to `quant_max`, ties to even, NaN to `quant_max`. `relu` clamps at 0, or at
    `zero_point` with `quantize`.
    Shapes: x (N, C_in, H, W), w (C_out, C_in/groups, KH, KW), scale and offset (C_out), residual like the result
    -> (N, C_out, OH, OW).

    >>> adder_conv2d_int8(torch.tensor([[[[1, 5]]]], dtype=torch.uint8), torch.tensor([[[[3, 3]]]], dtype=torch.uint8))
    tensor([[[[-4]]]], dtype=torch.int32)
    """
    y = x.new_zeros((), dtype=torch.int32)
    for _, _, x_k, w_k in _taps(x.int(), w.int(), stride, padding, dilation, groups, padding_value):
        y = y - (x_k - w_k).abs()
    y = y.flatten(1, 2)
    if scale is None or offset is None:
        return y
    z = offset[:, None, None] + scale[:, None, None] * y.float()
    if residual is not None:
        z = z + torch.tensor(residual_scale, dtype=torch.float32) * residual.float()
    if not quantize:
        return z.clamp(min=0) if relu else z
    return z.clamp(zero_point if relu else 0, quant_max).nan_to_num(quant_max).round().to(torch.uint8)


@torch.no_grad()
def quantize(x: Tensor, scale: float, zero_point: int, quant_max: int = 255) -> Tensor:
    """Returns round(x * (1/scale)) + zero_point, ties to even, clamped to 0 ... quant_max; quant_max for NaN; uint8.

    Shapes: x of any shape -> the same.

    >>> quantize(torch.tensor([[[[-1.0, 0.0, 0.3, 100.0]]]]), 0.1, 5)
    tensor([[[[  0,   5,   8, 255]]]], dtype=torch.uint8)
    """
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=x.device)
    return ((x.float() * inverse).round() + zero_point).clamp(0, quant_max).nan_to_num(quant_max).to(torch.uint8)
