"""The adder convolution as a function, with the argument rules of `torch.nn.functional.conv2d`."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from adderops import _ops

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Returns the adder convolution of `input` with `weight`: minus the L1 distance of every window to every filter.

    .. math:: Y[n,co,p] = -\sum_k |X[n,k,p] - W[co,k]| + b[co],  \quad k = (ci, kh, kw)

    In training the gradients are those of AdderNet, deliberately not the derivatives (which hold only signs):

    .. math:: dW[co,k] = \sum_p dY[co,p] (X[k,p] - W[co,k]), \quad
              dX[k,p] = \sum_{co} dY[co,p] \max(-1, \min(1, W[co,k] - X[k,p]))

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, bfloat16 or float16, contiguous or channels_last (the
            output keeps the format) or any other view. Under autocast it is computed in float32.
        weight: (C_out, C_in/groups, KH, KW), same dtype and device.
        bias: (C_out), or None.
        stride, dilation: positive, in pixels; one number or (height, width).
        padding: pixels of zeros on both sides, one number or (height, width); 'valid' is none, 'same' keeps the size
            and puts the odd pixel below and to the right. A padded pixel takes part in the distance: it adds |W|.
        groups: divides C_in and C_out.

    Returns:
        (N, C_out, OH, OW), or (C_out, OH, OW) for an input without N, with
        OH = (H + 2*padding - dilation*(KH-1) - 1)//stride + 1 and OW likewise.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: sizes, shapes or devices that do not fit together.
        RuntimeError: in a second differentiation, which is not defined.

    Source: AdderNet, arXiv 1912.13200, equations 2, 5 and 6.

    >>> import torch
    >>> from adderops.functional import adder_conv2d
    >>> adder_conv2d(torch.tensor([[[1.0, 5.0, 3.0]]]), torch.tensor([[[[3.0, 3.0]]]]))
    tensor([[[-4., -2.]]])
    """
    _check_tensors(input, weight, bias, groups)
    stride = _pair("stride", stride, least=1)
    dilation = _pair("dilation", dilation, least=1)
    sides = _four_sides(padding, weight, stride, dilation)
    for axis, name in ((0, "height"), (1, "width")):
        size = input.size(axis - 2) + sides[2 * axis] + sides[2 * axis + 1]
        span = dilation[axis] * (weight.size(2 + axis) - 1) + 1
        if span > size:
            raise _bad("weight", f"a kernel no larger than the padded input in {name}", f"{span} > {size}")
    if input.dim() == 4:
        return _ops.adder_conv2d(input, weight, bias, stride, sides, dilation, groups)
    return _ops.adder_conv2d(input.unsqueeze(0), weight, bias, stride, sides, dilation, groups).squeeze(0)


def _bad(argument: str, expected: str, got: object, error: type[Exception] = ValueError) -> Exception:
    return error(f"adder_conv2d: {argument}: expected {expected}, got {got}")


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise _bad(name, "a tensor", type(tensor).__name__, TypeError)
        if tensor.dtype not in _DTYPES:
            raise _bad(name, "dtype float32, float64, bfloat16 or float16", tensor.dtype, TypeError)
        # autocast brings the dtypes together behind this check
        if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise _bad(name, f"the dtype of input, {input.dtype}", tensor.dtype, TypeError)
        if tensor.device != input.device:
            raise _bad(name, f"the device of input, {input.device}", tensor.device)
    if input.device.type == "cuda" and _ops.CUDA_KERNELS_MISSING:
        raise _bad("input", f"a tensor on the CPU (no CUDA kernels: {_ops.CUDA_KERNELS_MISSING})", input.device)
    if input.device.type not in ("cpu", "cuda", "meta"):
        raise _bad("input", "a tensor on the CPU or a CUDA device", input.device)

    if input.dim() not in (3, 4):
        raise _bad("input", "shape (N, C_in, H, W) or (C_in, H, W)", tuple(input.shape))
    if weight.dim() != 4 or weight.numel() == 0:
        raise _bad("weight", "shape (C_out, C_in/groups, KH, KW) without zeros", tuple(weight.shape))
    if not isinstance(groups, int):
        raise _bad("groups", "an integer", type(groups).__name__, TypeError)
    channels_in, channels_out = input.size(-3), weight.size(0)
    if groups < 1 or channels_in % groups or channels_out % groups:
        raise _bad("groups", f"a positive divisor of C_in = {channels_in} and C_out = {channels_out}", groups)
    if weight.size(1) * groups != channels_in:
        raise _bad("weight", f"C_in/groups = {channels_in // groups} input channels", tuple(weight.shape))
    if bias is not None and bias.shape != (channels_out,):
        raise _bad("bias", f"shape ({channels_out},)", tuple(bias.shape))


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """(height, width) of an argument given as one integer or as a sequence of one or two."""
    expected = f"an integer or a pair of integers, at least {least}"
    try:
        values = (index(value),) if not isinstance(value, (tuple, list)) else tuple(index(v) for v in value)
    except TypeError:
        raise _bad(name, expected, repr(value), TypeError) from None
    if len(values) not in (1, 2) or any(v < least for v in values):
        raise _bad(name, expected, value)
    return values[0], values[-1]


def _four_sides(padding, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, ...]:
    """(top, bottom, left, right)."""
    if not isinstance(padding, str):
        vertical, horizontal = _pair("padding", padding, least=0)
        return vertical, vertical, horizontal, horizontal
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise _bad("padding", "numbers, 'same' or 'valid'", repr(padding))
    if stride != (1, 1):
        raise _bad("stride", "1 with padding='same'", stride)
    total = [dilation[axis] * (weight.size(2 + axis) - 1) for axis in range(2)]
    return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
