"""The definition of a program: what each layer computes. C code must give the same bits.

With the float32 epilogue they are also those of the integer network that the program was made from.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from adderops import _ops
from adderops.edge.fixed_point import FixedPoint, adder_constants, product_constants
from adderops.edge.program import (
    Add,
    AdderConv,
    AdderSums,
    Bytes,
    Counts,
    Dequantize,
    Floats,
    Layer,
    MaxPool,
    MultiplyConv,
    Output,
    Program,
    Quantize,
    Relu,
    SumPool,
    Window,
)
from adderops.reference import fixed_point_epilogue


def bytes_of(program: Program, images: Tensor) -> Tensor:
    """Returns the network's inputs (N, C, H, W) on the first grid, uint8: clamp(round(x * (1/s)) + zero_point)."""
    return _finish(images, program.first)


def run(program: Program, x: Tensor) -> Tensor:
    """Returns the outputs (N, ...), float32, for bytes (N, C, H, W) on the first grid."""
    return trace(program, x)[program.output].reshape(len(x), *program.shape)


def trace(program: Program, x: Tensor) -> dict[str, Tensor]:
    """Returns all values by name, (N, C, H, W), for bytes (N, C, H, W) on the first grid."""
    source = program.values[program.input]
    expected = (source.channels, source.height, source.width)
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1:] != expected:
        raise ValueError(f"x: expected uint8 (N, {', '.join(map(str, expected))}), got {x.dtype} {tuple(x.shape)}")
    known = {program.input: x}
    for layer in program.layers:
        known[layer.y] = compute(layer, known, program.epilogue)
    return known


def compute(layer: Layer, known: Mapping[str, Tensor], epilogue: str = "float32") -> Tensor:
    """Returns what a layer writes, from the values that it reads."""
    fixed = epilogue == "integer" and not isinstance(getattr(layer, "output", None), Floats)
    if isinstance(layer, AdderConv):
        return _adder_in_fixed_point(layer, known) if fixed else _adder(layer, known)
    if isinstance(layer, MultiplyConv):
        sums = product_sums(layer, known[layer.x])
        if fixed:
            return _fixed(product_constants(layer), sums.long(), layer.output)
        z = sums.float() * layer.scale[:, None, None]
        return _finish(z if layer.bias is None else z + layer.bias[:, None, None], layer.output)
    if isinstance(layer, SumPool):
        u = known[layer.x]
        if layer.step is not None:
            u = _floats(u, *layer.step)
        u = u if u.dtype == torch.int32 else _finish(u, Counts(layer.inverse, layer.bound))
        return _finish(window_sums(u, layer.window).float() * _float32(layer.factor), layer.output)
    if isinstance(layer, MaxPool):
        return max_pool(known[layer.x], layer.window)
    if isinstance(layer, Quantize):
        return _finish(known[layer.x], layer.output)
    if isinstance(layer, Dequantize):
        return _floats(known[layer.x], layer.step, layer.zero_point)
    if isinstance(layer, Relu):
        return known[layer.x].clamp(min=0)
    if isinstance(layer, Add):
        return known[layer.a] + known[layer.b]
    raise TypeError(f"layer: expected one of adderops.edge.program, got {type(layer).__name__}")


def _adder(layer: AdderConv, known: Mapping[str, Tensor]) -> Tensor:
    z = _affine(layer.sums, known)
    if layer.shortcut is not None:
        z = z + _float32(layer.residual_scale) * _affine(layer.shortcut, known)
    elif layer.residual is not None:
        z = z + _float32(layer.residual_scale) * known[layer.residual].float()
    return _finish(z, layer.output)


def _adder_in_fixed_point(layer: AdderConv, known: Mapping[str, Tensor]) -> Tensor:
    own, other = adder_constants(layer)
    beside = None
    if layer.shortcut is not None and other is not None:
        sums = distances(layer.shortcut, known[layer.shortcut.x]).long()
        beside = other.c[:, None, None] + other.m[:, None, None] * sums
    residual = None if layer.residual is None else known[layer.residual]
    return _fixed(own, distances(layer.sums, known[layer.sums.x]), layer.output, residual, beside)


def _fixed(
    constants: FixedPoint, sums: Tensor, output: Output, residual: Tensor | None = None, beside: Tensor | None = None
) -> Tensor:
    if isinstance(output, Bytes):
        least, most = output.least, output.most
    else:
        assert isinstance(output, Counts)
        bound = output.bound if output.total else 2**31 - 1
        least, most = 0 if output.relu else -bound, bound
    v = fixed_point_epilogue(sums, constants.c, constants.m, residual, constants.r, beside, least, most)
    if isinstance(output, Bytes):
        return v.to(torch.uint8)
    return v.long().sum((2, 3), keepdim=True).to(torch.int32) if output.total else v


def distances(sums: AdderSums, x: Tensor) -> Tensor:
    """Returns sum |x - w| over each window, int32."""
    w = sums.window
    epilogue = (None, None, None, 1.0, False, False, 0, 255, sums.padding_value)
    return -_ops.adder_conv2d_int8(x, sums.weight, *epilogue, w.stride, w.padding, w.dilation, sums.groups)


def product_sums(layer: MultiplyConv, x: Tensor) -> Tensor:
    """Returns sum (x - zero_point) * w over each window, exactly, as integers in float64."""
    top, bottom, left, right = layer.window.padding
    differences = F.pad(x.double() - layer.zero_point, (left, right, top, bottom))
    weight = layer.weight.double().contiguous()
    return F.conv2d(differences, weight, None, layer.window.stride, 0, layer.window.dilation, layer.groups)


def max_pool(x: Tensor, window: Window) -> Tensor:
    """Returns the largest value of each window."""
    top, bottom, left, right = window.padding
    lowest = 0 if x.dtype == torch.uint8 else float("-inf")
    padded = F.pad(x.float(), (left, right, top, bottom), value=lowest)
    return F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation).to(x.dtype)


def window_sums(u: Tensor, window: Window) -> Tensor:
    """Returns the sum of each window, in int64; outside of the input, u = 0."""
    top, bottom, left, right = window.padding
    padded = F.pad(u.double(), (left, right, top, bottom))  # exact: |sum| < 2^24
    return F.avg_pool2d(padded, window.kernel, window.stride, divisor_override=1).round().long()


def _affine(sums: AdderSums, known: Mapping[str, Tensor]) -> Tensor:
    y = (-distances(sums, known[sums.x])).float()
    return sums.offset[:, None, None] + sums.scale[:, None, None] * y


def _floats(x: Tensor, step: float, zero_point: int) -> Tensor:
    return (x.float() - zero_point) * _float32(step)


def _finish(z: Tensor, output: Output) -> Tensor:
    if isinstance(output, Floats):
        return z.clamp(min=0) if output.relu else z
    if isinstance(output, Counts):
        u = (z * _float32(output.inverse)).round().clamp(0 if output.relu else -output.bound, output.bound)
        return (u.double().sum((2, 3), keepdim=True) if output.total else u).to(torch.int32)
    if output.inverse is not None:
        z = (z * _float32(output.inverse)).round() + output.zero_point
    return z.clamp(output.least, output.most).round().to(torch.uint8)


def _float32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)
