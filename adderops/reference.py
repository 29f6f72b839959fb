"""The definition of the operators in plain PyTorch: slow, readable, for any floating dtype and any device.

Every backend is tested against the first three functions and those of L_mid in float64, and against
`adder_conv2d_int8` and `quantize` bit for bit. `fixed_point_epilogue` is what generated C computes without floats
(`adderops.edge`). Arguments are those of the compiled operators: `stride` (h, w), `padding` (top, bottom, left, right),
`dilation` (h, w). The convolutions loop over the taps k = (ci, kh, kw), so that no temporary is larger than the output.
No function records a graph but `kernel_moments`, which float64 networks train through.
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


MAX_EXPONENT = 10.0  # of the kernels of L_mid


@torch.no_grad()
def mean_abs(x: Sequence[Tensor]) -> Tensor:
    """Returns mean |x| of each tensor.

    Shapes: L tensors of any shape -> (L).

    >>> mean_abs([torch.tensor([-1.0, 3.0]), torch.zeros(1)])
    tensor([2., 0.])
    """
    return torch.stack([_not_half(each).abs().mean() for each in x])


def kernel_moments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scales: Tensor,
    centre_a: float,
    centre_c: float,
    exponential: bool,
) -> Tensor:
    """Returns E[z z^T] and, as one more row, E[z] of each layer, over all pixels; only the student gets a gradient.

    z = (phi(scales[0] * student) - centre_a, phi(scales[1] * teacher) - centre_c), the channels one after the other.
    phi is exp, or the identity without `exponential`. The exponent is clamped to at most 10; above, the gradient is the
    one at the bound.
    Shapes: L tensors (N, C_a, H, W) and L (N, C_c, H, W), scales (2, L)
    -> the (D + 1, D) of each layer, D = C_a + C_c, flattened and one after the other.

    >>> kernel_moments([torch.zeros(2, 1, 3, 3)], [torch.ones(2, 1, 3, 3)], torch.ones(2, 1), 0, 0, False)
    tensor([0., 0., 0., 1., 0., 1.])
    """

    def feature(x: Tensor, scale: Tensor, centre: float) -> Tensor:
        exponent = _not_half(x).transpose(0, 1).flatten(1) * scale
        if exponential:
            over = (
                (exponent - MAX_EXPONENT).clamp(min=0).detach()
            )  # as a constant: the gradient is the one at the bound
            exponent = (exponent - over).exp()
        return exponent - centre

    moments = []
    for y, c, (scale_a, scale_c) in zip(student, teacher, scales.detach().T, strict=True):
        z = torch.cat([feature(y, scale_a, centre_a), feature(c.detach(), scale_c, centre_c)])
        moments.append(torch.cat([z @ z.T / z.size(1), z.mean(1)[None]]).flatten())
    return torch.cat(moments)


@torch.enable_grad()
def kernel_moments_grad(
    grad: Tensor, student: Sequence[Tensor], teacher: Sequence[Tensor], scales: Tensor, *options: Any
) -> list[Tensor]:
    """Returns the gradient by each of the student's outputs; `grad` is that by the result of `kernel_moments`.

    >>> y, c, scales = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(2, 1)
    >>> kernel_moments_grad(torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0, 0.0]), [y], [c], scales, 0, 0, False)
    [tensor([[[[2., 2.]]]])]
    """
    leaves = [y.detach().requires_grad_() for y in student]
    return list(torch.autograd.grad(kernel_moments(leaves, teacher, scales, *options), leaves, grad))


@torch.no_grad()
def match_rows(
    mixed_a: Sequence[Tensor], mixed_c: Sequence[Tensor], w_a: Sequence[Tensor], w_c: Sequence[Tensor], eps: float
) -> list[Tensor]:
    r"""Returns the terms of L_mid and what their gradients need, from W_a cov[a, :] and W_c cov[c, :] of each layer.

    With a for the student's columns and c for the teacher's, row by row:

    .. math:: var_a = \langle mixed_a[a], w_a \rangle, \quad cov = \langle mixed_a[c], w_c \rangle, \quad
              var_c = \langle mixed_c[c], w_c \rangle
    .. math:: term = mean_{rows} \Bigl( \frac{var_a}{var_a + eps} + \frac{var_c}{var_c + eps}
              - \frac{2\,cov}{\sqrt{(var_a + eps)(var_c + eps)}} \Bigr)

    Variances are clamped at 0 and get no gradient below. g_a, g_c and g are the gradients of a layer's term by the
    var_a, var_c and cov of a row.

    Args:
        mixed_a, mixed_c: (l, w, C_a + C_c) of each group of l layers of one size.
        w_a, w_c: (l, w, C_a) and (l, w, C_c).
        eps: of the BatchNorms.

    Returns:
        [terms, mean of var_c over the rows] of all layers, group after group; then of each group
        [2 g_a w_a | g w_c] (l, w, C_a + C_c), which W_a^T leads to the rows a of G + G^T, G the gradient by cov; and
        the gradients by w_a and w_c.

    >>> one = torch.ones(1, 1, 1)
    >>> match_rows([torch.tensor([[[4.0, 3.0]]])], [torch.tensor([[[3.0, 9.0]]])], [one], [one], 0)[:2]
    [tensor([1.]), tensor([9.])]
    """
    terms, variances, gradients = [], [], []
    for m_a, m_c, a, c in zip(mixed_a, mixed_c, w_a, w_c, strict=True):
        (aa, ac), (ca, cc) = (m.split([a.size(2), c.size(2)], 2) for m in (m_a, m_c))
        signed_a, cov, signed_c = (aa * a).sum(2), (ac * c).sum(2), (cc * c).sum(2)
        var_a, var_c = signed_a.clamp(min=0), signed_c.clamp(min=0)
        inv_a, inv_c = (var_a + eps).rsqrt(), (var_c + eps).rsqrt()
        terms.append((var_a * inv_a**2 + var_c * inv_c**2 - 2 * cov * inv_a * inv_c).mean(1))
        variances.append(var_c.mean(1))
        g_a = (eps * inv_a**4 + cov * inv_a**3 * inv_c) * (signed_a >= 0) / a.size(1)
        g_c = (eps * inv_c**4 + cov * inv_c**3 * inv_a) * (signed_c >= 0) / a.size(1)
        g = -2 * inv_a * inv_c / a.size(1)
        g_a, g_c, g = (gradient.unsqueeze(2) for gradient in (g_a, g_c, g))
        gradients += [torch.cat([2 * g_a * a, g * c], 2), 2 * g_a * aa + g * ca, 2 * g_c * cc + g * ac]
    return [torch.cat(terms), torch.cat(variances), *gradients]


@torch.no_grad()
def integrate_and_fire(
    x: Tensor,
    threshold: Tensor,
    initial: Tensor | None,
    decay: float,
    gain: float,
    fire: float,
    subtract: bool,
    scaled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns spikes, counts and final membranes of neurons; see `adderops.spiking.integrate_and_fire`.

    Shapes: x (T, N, ...); threshold of one number, (C) or x.shape[2:]; initial also x.shape[1:] ->
    x.shape, x.shape[1:], x.shape[1:].

    >>> x = torch.tensor([[[0.75]], [[0.75]]])
    >>> [y.flatten().tolist() for y in integrate_and_fire(x, torch.tensor(1.0), None, 1.0, 1.0, 1.0, True, False)]
    [[0.0, 1.0], [1.0], [0.5]]
    """
    dtype = torch.promote_types(x.dtype, torch.float32)

    def per_neuron(value: Tensor) -> Tensor:
        if value.dim() == 1 and value.numel() > 1 and x.dim() > 3:  # per channel
            value = value.view(-1, *(1 for _ in x.shape[3:]))
        return value.to(dtype).expand(x.shape[1:])

    v = per_neuron(threshold)
    u = torch.zeros_like(v) if initial is None else per_neuron(initial).clone()
    count = torch.zeros_like(u)
    spikes = torch.empty_like(x)
    for t in range(len(x)):
        u = decay * u + gain * x[t].to(dtype)
        fired = u >= fire * v
        spikes[t] = torch.where(fired, v if scaled else torch.ones_like(v), 0.0)
        u = torch.where(fired, u - v if subtract else torch.zeros_like(u), u)
        count += fired
    return spikes, count, u


def _not_half(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


FRACTION_BITS = 32  # of the numbers in the fixed-point epilogue


@torch.no_grad()
def fixed_point_constants(a: Tensor, b: Tensor, residual_scale: float = 0.0) -> tuple[Tensor, Tensor, int]:
    """Returns c, m and r of `fixed_point_epilogue` for z = b[co] + a[co] * sum + residual_scale * R.

    c = round(b * 2^32) + 2^31, m = round(a * 2^32), r = round(residual_scale * 2^29), ties to even. For the distances
    of an adder layer, a is -scale. z is in steps of the grid of the result, with the zero point in b. The 2^31 makes
    the shift of the epilogue a rounding; take it off for a layer whose c + m * sum is added to that of another.

    Shapes: a and b (C), float32 -> c and m (C), int64, where m and r fit into int32.

    Raises:
        ValueError: |a| of 0.5 or more, |b| of 2^24 or more, |residual_scale| of 4 or more, or NaN.

    >>> fixed_point_constants(torch.tensor([-0.25]), torch.tensor([10.0]), 1.5)
    (tensor([45097156608]), tensor([-1073741824]), 805306368)
    """
    largest = {"a": a.abs().max().item(), "b": b.abs().max().item(), "residual_scale": abs(residual_scale)}
    for (name, magnitude), bound in zip(largest.items(), (0.5, 2**24, 4), strict=True):
        if not magnitude < bound:
            raise ValueError(f"fixed_point_constants: {name}: expected a magnitude below {bound}, got {magnitude}")
    one = 2.0**FRACTION_BITS
    c = (b.double() * one).round().long() + 2 ** (FRACTION_BITS - 1)
    return c, (a.double() * one).round().long(), round(residual_scale * one / 8)


@torch.no_grad()
def fixed_point_epilogue(
    sums: Tensor,
    c: Tensor,
    m: Tensor,
    residual: Tensor | None = None,
    r: int = 0,
    beside: Tensor | None = None,
    least: int = 0,
    most: int = 255,
) -> Tensor:
    """Returns clamp((c[co] + m[co] * sum + r * (8 * residual)) >> 32, least, most), int32: an epilogue without floats.

    The sums, products and the arithmetic shift (to minus infinity) are exact in int64. With the c, m, r of
    `fixed_point_constants` it rounds z = b + a * sum + residual_scale * residual to the nearest integer, ties upwards,
    except that z is off by up to (sum + 8 * residual + 1) / 2^33. So it is not the function of `adder_conv2d_int8`,
    which rounds to float32 twice or more and ties to even.

    Args:
        sums: sum |X - W| of an adder layer, or sum X W of one that multiplies; integers within int32.
        c, m: int64. Those of `fixed_point_constants` leave room for every sum; larger ones must, too.
        residual: bytes.
        r: an integer.
        beside: c + m * sum of a layer whose result is added before the shift, int64.
        least, most: within int32; 0 and 255 for bytes, and a larger `least` for a ReLU at another zero point.

    Shapes: sums, residual and beside (N, C, OH, OW), c and m (C) -> (N, C, OH, OW).

    >>> c, m, _ = fixed_point_constants(torch.tensor([-0.25]), torch.tensor([10.0]))
    >>> fixed_point_epilogue(torch.tensor([[[[1, 2, 3, 4, 100]]]]), c, m)
    tensor([[[[10, 10,  9,  9,  0]]]], dtype=torch.int32)
    """
    v = c[:, None, None] + m[:, None, None] * sums.long()
    if residual is not None:
        v = v + r * (8 * residual.long())
    if beside is not None:
        v = v + beside
    return (v >> FRACTION_BITS).clamp(least, most).int()
