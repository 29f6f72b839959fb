"""Adder convolution as functions, in floating point and int8, with the argument rules of `F.conv2d`.

Like the functions of `torch.nn.functional` they first defer to arguments that define `__torch_function__` (proxies of
`torch.fx`, subclasses of Tensor). Only plain tensors are checked here.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from adderops import _ops

_LARGEST = 2**31 - 1  # of stride, padding and dilation: the limit of the operators
# The checks read sizes, which a trace turns into constants; no warning, as in PyTorch's own functions
warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning, module=r"adderops\.functional")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INT8_DTYPES = {
    "input": (torch.uint8,),
    "weight": (torch.uint8,),
    "scale": (torch.float32,),
    "offset": (torch.float32,),
    "residual": (torch.uint8, torch.float32),
}


def adder_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Returns the adder convolution of `input` with `weight`: minus the L1 distance of each window to each filter.

    .. math:: Y[n,co,p] = -\sum_k |X[n,k,p] - W[co,k]| + b[co],  \quad k = (ci, kh, kw)

    The training gradients are those of AdderNet, deliberately not the derivatives, which would be signs only:

    .. math:: dW[co,k] = \sum_p dY[co,p] (X[k,p] - W[co,k]), \quad
              dX[k,p] = \sum_{co} dY[co,p] \max(-1, \min(1, W[co,k] - X[k,p]))

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float64, bfloat16 or float16; contiguous, channels_last (the
            output keeps the format) or any other view. Autocast computes in float32.
        weight: (C_out, C_in/groups, KH, KW), same dtype and device.
        bias: (C_out), or None.
        stride, dilation: positive, in pixels; one number or (height, width).
        padding: zeros added on both sides, in pixels; one number or (height, width); 'valid' is no padding, 'same'
            keeps the size and puts an odd pixel at the bottom and right. A padded pixel counts: it adds |W|.
        groups: divides C_in and C_out.

    Returns:
        (N, C_out, OH, OW), or (C_out, OH, OW) for an input without N, with
        OH = (H + 2*padding - dilation*(KH-1) - 1)//stride + 1 and OW likewise.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: sizes, shapes or devices that do not fit together.
        RuntimeError: on second derivatives and forward-mode differentiation, which are not defined.

    Source: AdderNet, arXiv 1912.13200, equation 2; the gradients: section 3.2, equations 5 and 6.

    >>> import torch
    >>> from adderops.functional import adder_conv2d
    >>> adder_conv2d(torch.tensor([[[1.0, 5.0, 3.0]]]), torch.tensor([[[[3.0, 3.0]]]]))
    tensor([[[-4., -2.]]])
    """
    tensors = (input, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(adder_conv2d, tensors, *tensors, stride, padding, dilation, groups)
    _check_floats("adder_conv2d", *tensors)
    geometry = _geometry(input, weight, stride, padding, dilation, groups)
    if bias is not None and bias.shape != (weight.size(0),):
        raise _bad("bias", f"shape ({weight.size(0)},)", tuple(bias.shape))
    if input.dim() == 4:
        return _ops.adder_conv2d(input, weight, bias, *geometry)
    return _ops.adder_conv2d(input.unsqueeze(0), weight, bias, *geometry).squeeze(0)


def adder_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Returns minus the L1 distance of each vector to each filter: a 1x1 adder convolution, with its gradients.

    .. math:: y[co] = -\sum_{ci} |x[ci] - W[co,ci]| + b[co]

    Args:
        input: (*, in_features), with any number of leading dimensions; dtypes as in `adder_conv2d`.
        weight: (out_features, in_features), same dtype and device.
        bias: (out_features), or None.

    Returns:
        (*, out_features).

    Raises:
        TypeError, ValueError, RuntimeError: as `adder_conv2d`.

    Source: AdderNet, arXiv 1912.13200, equation 2.

    >>> import torch
    >>> from adderops.functional import adder_linear
    >>> adder_linear(torch.tensor([1.0, 5.0]), torch.tensor([[3.0, 3.0], [1.0, 4.0]]))
    tensor([-4., -1.])
    """
    tensors = (input, weight, bias)
    if has_torch_function(tensors):
        return handle_torch_function(adder_linear, tensors, *tensors)
    _check_floats("adder_linear", *tensors)
    bad = partial(_bad, operator="adder_linear")
    if weight.dim() != 2 or weight.numel() == 0:
        raise bad("weight", "shape (out_features, in_features) without zeros", tuple(weight.shape))
    features_out, features_in = weight.shape
    if input.dim() == 0 or input.size(-1) != features_in:
        raise bad("input", f"shape (*, {features_in})", tuple(input.shape))
    if bias is not None and bias.shape != (features_out,):
        raise bad("bias", f"shape ({features_out},)", tuple(bias.shape))
    pixels = input.reshape(-1, features_in, 1, 1)
    y = _ops.adder_conv2d(pixels, weight[..., None, None], bias, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    return y.reshape(*input.shape[:-1], features_out)


def adder_conv2d_int8(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
    *,
    relu: bool = False,
    dtype: torch.dtype | None = None,
    zero_point: int = 0,
    quant_max: int = 255,
    padding_value: int = 0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    r"""Returns the exact adder convolution of uint8 tensors, optionally with an epilogue: affine map, residual, ReLU.

    .. math:: Y[n,co,p] = -\sum_k |X[n,k,p] - W[co,k]|, \quad z = (b[co] + a[co] Y) + r R

    Input and weight must share one grid: with x = s (X - Z) and w = s (W - Z), `-sum |x - w| = s Y` whatever the zero
    point Z. One x86 instruction (psadbw) sums |a - b| over bytes, so uint8 is an adder network's fastest format. For
    inference: no gradient is defined.

    Args:
        input: X, uint8, (N, C_in, H, W); any strides, but the kernels copy what is not channels_last.
        weight: W, uint8, (C_out, C_in/groups, KH, KW).
        scale, offset: a and b, float32, (C_out); both or neither.
        residual: R, uint8 or float32, of the shape of the result.
        residual_scale: r.
        relu: clamps the result at 0, or at `zero_point` if it is uint8.
        dtype: of the result: int32 is Y (the default without scale), float32 is z (the default with scale), uint8 is z
            rounded to the nearest integer from 0 to `quant_max`, ties to even: the input of the next layer.
        zero_point: the integer that stands for 0 in the result, 0 to `quant_max`; only `relu` uses it.
        quant_max: largest integer of the result, 1 to 255; below 255 for a grid of fewer bits.
        padding_value: the integer that stands for 0 in `input`, 0 to 255: the value of padded pixels.
        stride, padding, dilation, groups: as in `adder_conv2d`.

    Returns:
        (N, C_out, OH, OW), channels_last. The bits are the same for every instruction set, device and number of
        threads: sums are exact, and z is computed in float32 in the order of the formula.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: sizes, shapes, devices or options that do not fit together.
        RuntimeError: on differentiation.

    >>> import torch
    >>> from adderops.functional import adder_conv2d_int8
    >>> x, w = (torch.tensor(v, dtype=torch.uint8) for v in ([[[[10, 50, 30]]]], [[[[30, 30]]]]))
    >>> adder_conv2d_int8(x, w)
    tensor([[[[-40, -20]]]], dtype=torch.int32)
    >>> adder_conv2d_int8(x, w, torch.tensor([0.25]), torch.tensor([8.0]), dtype=torch.uint8)
    tensor([[[[0, 3]]]], dtype=torch.uint8)
    """
    inputs = (input, weight, scale, offset, residual)
    if has_torch_function(inputs):
        return handle_torch_function(
            adder_conv2d_int8,
            inputs,
            *inputs,
            residual_scale,
            relu=relu,
            dtype=dtype,
            zero_point=zero_point,
            quant_max=quant_max,
            padding_value=padding_value,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    bad = partial(_bad, operator="adder_conv2d_int8")
    floats = {"scale": scale, "offset": offset}
    tensors: dict[str, Tensor | None] = {"input": input, "weight": weight, **floats, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is None and name not in ("input", "weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise bad(name, "a tensor", type(tensor).__name__, TypeError)
        expected = _INT8_DTYPES[name]
        if tensor.dtype not in expected:
            raise bad(name, f"dtype {' or '.join(map(str, expected))}", tensor.dtype, TypeError)
    _check_dense("adder_conv2d_int8", input=input, weight=weight, **floats, residual=residual)
    geometry = _geometry(input, weight, stride, padding, dilation, groups, "adder_conv2d_int8")
    if input.dim() != 4:
        raise bad("input", "shape (N, C_in, H, W)", tuple(input.shape))
    if (scale is None) != (offset is None):
        raise bad("offset", "both scale and offset or neither", "one")
    for name, tensor in floats.items():
        if tensor is not None and tensor.shape != (weight.size(0),):
            raise bad(name, f"shape ({weight.size(0)},)", tuple(tensor.shape))
    results = (torch.int32,) if scale is None else (torch.float32, torch.uint8)
    if dtype not in (None, *results):
        with_or_without = "without" if scale is None else "with"
        raise bad("dtype", f"{' or '.join(map(str, results))} {with_or_without} scale", dtype)
    if scale is None and (relu or residual is not None):
        raise bad("scale", "a tensor with relu or residual", "None")
    if not isinstance(relu, bool):
        raise bad("relu", "a bool", repr(relu), TypeError)
    residual_scale = _number("residual_scale", residual_scale, bad)
    if not math.isfinite(residual_scale):
        raise bad("residual_scale", "a finite number", residual_scale)
    quant_max = _byte("quant_max", quant_max, bad, least=1)
    zero_point = _byte("zero_point", zero_point, bad, most=quant_max)
    padding_value = _byte("padding_value", padding_value, bad)
    quantize = dtype == torch.uint8
    epilogue = (scale, offset, residual, residual_scale, relu, quantize, zero_point, quant_max, padding_value)
    shape = _ops.output_shape(input, weight, *geometry[:3])
    if residual is not None and residual.shape != shape:
        raise bad("residual", f"shape {shape}", tuple(residual.shape))
    return _ops.adder_conv2d_int8(input, weight, *epilogue, *geometry)


def quantize(input: Tensor, scale: float, zero_point: int = 0, quant_max: int = 255) -> Tensor:
    r"""Quantizes x to uint8: X = round(x / scale) + zero_point, ties to even, clamped to 0 ... quant_max.

    x / scale is computed as x * (1 / scale) in float32. NaN becomes quant_max.

    Args:
        input: x, (N, C, H, W), float32, bfloat16 or float16, any strides.
        scale: the step of the grid, in units of x; from 2^-126 to 2^126.
        zero_point: the integer that stands for 0, 0 to `quant_max`.
        quant_max: the largest integer, 1 to 255; below 255 for a grid of fewer bits.

    Returns:
        uint8, (N, C, H, W), channels_last: what `adder_conv2d_int8` reads without a copy.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: a shape, device or number out of range.

    >>> import torch
    >>> from adderops.functional import quantize
    >>> quantize(torch.tensor([[[[-1.0, 0.0, 0.3, 100.0]]]]), 0.1, 5)
    tensor([[[[  0,   5,   8, 255]]]], dtype=torch.uint8)
    """
    if has_torch_function((input,)):
        return handle_torch_function(quantize, (input,), input, scale, zero_point, quant_max)
    bad = partial(_bad, operator="quantize")
    if not isinstance(input, Tensor):
        raise bad("input", "a tensor", type(input).__name__, TypeError)
    if input.dtype not in _DTYPES or input.dtype == torch.float64:
        raise bad("input", "dtype float32, bfloat16 or float16", input.dtype, TypeError)
    _check_dense("quantize", input=input)
    if input.dim() != 4:
        raise bad("input", "shape (N, C, H, W)", tuple(input.shape))
    scale = _number("scale", scale, bad)
    if not 2**-126 <= scale <= 2**126:
        raise bad("scale", "a positive number whose inverse is one in float32", scale)
    quant_max = _byte("quant_max", quant_max, bad, least=1)
    zero_point = _byte("zero_point", zero_point, bad, most=quant_max)
    return _ops.quantize(input, scale, zero_point, quant_max)


def _bad(
    argument: str, expected: str, got: object, error: type[Exception] = ValueError, operator: str = "adder_conv2d"
) -> Exception:
    return error(f"{operator}: {argument}: expected {expected}, got {got}")


def _integer(value: Any) -> int:
    """Returns the value of any integer, NumPy's too; TypeError for anything else, bool included, as in `F.conv2d`."""
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def _byte(name: str, value: Any, bad: Callable[..., Exception], least: int = 0, most: int = 255) -> int:
    expected = f"an integer from {least} to {most}"
    try:
        byte = _integer(value)
    except TypeError:
        raise bad(name, expected, repr(value), TypeError) from None
    if not least <= byte <= most:
        raise bad(name, expected, repr(value))
    return byte


def _number(name: str, value: Any, bad: Callable[..., Exception]) -> float:
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last two come from arrays and tensors of several numbers
        raise bad(name, "a number", repr(value), TypeError) from None


def _check_floats(operator: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    bad = partial(_bad, operator=operator)
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise bad(name, "a tensor", type(tensor).__name__, TypeError)
        if tensor.dtype not in _DTYPES:
            by_others = " of torch.ao: adder layers are quantized by adderops.quant" if tensor.is_quantized else ""
            raise bad(name, "dtype float32, float64, bfloat16 or float16", f"{tensor.dtype}{by_others}", TypeError)
        # autocast converts to a common dtype after this check
        if tensor.dtype != input.dtype and not _is_autocast_enabled(input.device.type):
            raise bad(name, f"the dtype of input, {input.dtype}", tensor.dtype, TypeError)
    _check_dense(operator, input=input, weight=weight, bias=bias)


def _is_autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_dense(operator: str, *, input: Tensor, **others: Tensor | None) -> None:
    bad = partial(_bad, operator=operator)
    for name, tensor in (("input", input), *others.items()):
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            raise bad(name, "a dense tensor", f"{'nested, ' if tensor.is_nested else ''}{tensor.layout}", TypeError)
        if tensor.device != input.device:
            raise bad(name, f"the device of input, {input.device}", tensor.device)
    if input.device.type == "cuda" and _ops.CUDA_KERNELS_MISSING:
        raise bad("input", f"a tensor on the CPU (no CUDA kernels: {_ops.CUDA_KERNELS_MISSING})", input.device)
    if input.device.type not in ("cpu", "cuda", "meta"):
        raise bad("input", "a tensor on the CPU or a CUDA device", input.device)


def _geometry(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    operator: str = "adder_conv2d",
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    """Returns stride, padding (top, bottom, left, right), dilation and groups as the operators take them."""
    bad = partial(_bad, operator=operator)
    if input.dim() not in (3, 4):
        raise bad("input", "shape (N, C_in, H, W) or (C_in, H, W)", tuple(input.shape))
    if weight.dim() != 4 or weight.numel() == 0:
        raise bad("weight", "shape (C_out, C_in/groups, KH, KW) without zeros", tuple(weight.shape))
    try:
        groups = _integer(groups)
    except TypeError:
        raise bad("groups", "an integer", repr(groups), TypeError) from None
    channels_in, channels_out = input.size(-3), weight.size(0)
    if groups < 1 or channels_in % groups or channels_out % groups:
        raise bad("groups", f"a positive divisor of C_in = {channels_in} and C_out = {channels_out}", groups)
    if weight.size(1) * groups != channels_in:
        raise bad("weight", f"C_in/groups = {channels_in // groups} input channels", tuple(weight.shape))
    stride = _pair("stride", stride, 1, bad)
    dilation = _pair("dilation", dilation, 1, bad)
    sides = _four_sides(padding, weight, stride, dilation, bad)
    for axis, name in ((0, "height"), (1, "width")):
        size = input.size(axis - 2) + sides[2 * axis] + sides[2 * axis + 1]
        span = dilation[axis] * (weight.size(2 + axis) - 1) + 1
        if span > size:
            raise bad("weight", f"a kernel no larger than the padded input in {name}", f"{span} > {size}")
    return stride, sides, dilation, groups


def _pair(name: str, value: int | Sequence[int], least: int, bad: Callable[..., Exception]) -> tuple[int, int]:
    """Returns (height, width) of an argument that is one integer or a sequence of one or two."""
    expected = f"an integer or a pair of integers, at least {least}"
    try:
        values = tuple(map(_integer, value)) if isinstance(value, (tuple, list)) else (_integer(value),)
    except TypeError:
        raise bad(name, expected, repr(value), TypeError) from None
    if len(values) not in (1, 2) or any(v < least for v in values):
        raise bad(name, expected, value)
    if any(v > _LARGEST for v in values):
        raise bad(name, "integers up to 2^31 - 1", value)
    return values[0], values[-1]


def _four_sides(
    padding: int | Sequence[int] | str,
    weight: Tensor,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    bad: Callable[..., Exception],
) -> tuple[int, int, int, int]:
    """Returns the padding as (top, bottom, left, right)."""
    if not isinstance(padding, str):
        vertical, horizontal = _pair("padding", padding, 0, bad)
        return vertical, vertical, horizontal, horizontal
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise bad("padding", "numbers, 'same' or 'valid'", repr(padding))
    if stride != (1, 1):
        raise bad("stride", "1 with padding='same'", stride)
    total = [dilation[axis] * (weight.size(2 + axis) - 1) for axis in range(2)]
    if max(total) > 2 * _LARGEST:
        raise bad("dilation", "a kernel of at most 2^32 - 1 pixels across with padding='same'", dilation)
    return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
