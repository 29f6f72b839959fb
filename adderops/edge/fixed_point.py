"""The constants of the fixed-point epilogue, for processors without floating-point unit.

    v = (c + m sum + r (8 R)) >> 32      `adderops.reference.fixed_point_epilogue`

for z = b + a sum + residual_scale R, which the float32 epilogue would round. Where that one works in two steps (z,
then round(z * inverse) + zero_point), the second is folded into a, b and residual_scale. A shortcut has constants c, m
of its own, times residual_scale, without the half that rounds.

C code has 32 bits for m and r. Larger scales, as layers of few terms have, drop their lowest bits: c, m and r are then
multiples of 2^shift, and C holds the multiples.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adderops.edge.program import AdderConv, AdderSums, Bytes, Counts, MultiplyConv, Output
from adderops.reference import fixed_point_constants

Constants = NDArray[np.uint32]

_HALF = 2**31  # of what the epilogue drops
_OFFSETS = 2**24  # of b


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """c and m of each filter, (C_out) in int64; r of the residual; all are multiples of 2^shift."""

    c: Tensor
    m: Tensor
    r: int
    shift: int

    @property
    def words(self) -> Constants:
        """c low, c high, m, 0 of each filter, divided by 2^shift."""
        c, m = self.c >> self.shift, self.m >> self.shift
        columns = torch.stack([c, c >> 32, m, torch.zeros_like(m)], dim=1)
        return (columns.numpy() & 0xFFFFFFFF).astype(np.uint32)


def adder_constants(layer: AdderConv) -> tuple[FixedPoint, FixedPoint | None]:
    """Returns the constants of an adder layer that does not write floats, and those of its shortcut.

    Raises:
        ValueError: numbers too large for fixed point, with the name of the layer.
    """
    factor, zero_point = _second_step(layer.output)
    own = _of_sums(layer.sums, factor, zero_point)
    beside = layer.residual_scale * factor
    if layer.shortcut is None:
        residual_scale = 0.0 if layer.residual is None else beside
        return _fixed(own, _shift(layer.name, own, residual_scale), residual_scale), None
    others = _of_sums(layer.shortcut, beside, 0)
    shift = max(_shift(layer.name, own), _shift(layer.name, others))
    other = _fixed(others, shift)
    return _fixed(own, shift), FixedPoint(other.c - _HALF, other.m, 0, shift)


def product_constants(layer: MultiplyConv) -> FixedPoint:
    """Returns the constants of a layer that multiplies and does not write floats.

    Raises:
        ValueError: numbers too large for fixed point, with the name of the layer.
    """
    factor, zero_point = _second_step(layer.output)
    bias = torch.zeros_like(layer.scale) if layer.bias is None else layer.bias
    largest = 255 * layer.weight.double().abs().flatten(1).sum(1)
    affine = _Affine(layer.scale.double() * factor, bias.double() * factor + zero_point, largest)
    return _fixed(affine, _shift(layer.name, affine))


@dataclass(frozen=True, eq=False)
class _Affine:
    """z = b + a * sum for each filter, with |sum| <= largest; float64."""

    a: Tensor
    b: Tensor
    largest: Tensor


def _of_sums(sums: AdderSums, factor: float, zero_point: int) -> _Affine:
    a, b = -sums.scale.double() * factor, sums.offset.double() * factor + zero_point
    return _Affine(a, b, torch.full_like(a, 255 * sums.weight[0].numel()))


def _second_step(output: Output) -> tuple[float, int]:
    """Returns factor and zero point of what follows z."""
    if isinstance(output, Counts):
        return output.inverse, 0
    if isinstance(output, Bytes) and output.inverse is not None:
        return output.inverse, output.zero_point
    return 1.0, 0


def _shift(name: str, affine: _Affine, residual_scale: float = 0.0) -> int:
    """Returns the smallest shift with which 32 bits hold m and r; z itself must fit into 32 bits."""
    scale, offset = affine.a.abs().max().item(), affine.b.abs().max().item()
    largest = (affine.a.abs() * affine.largest + affine.b.abs()).max().item() + 255 * abs(residual_scale)
    if not (largest < _HALF / 2 and offset < _OFFSETS):
        raise ValueError(
            f"layer {name!r}: epilogue='integer': expected results below 2^30 and offsets below 2^24, got up to "
            f"{largest:.3g} and {offset:.3g}: use epilogue='float32'"
        )
    return next(k for k in range(32) if scale < 0.5 * 2**k and abs(residual_scale) < 4 * 2**k)


def _fixed(affine: _Affine, shift: int, residual_scale: float = 0.0) -> FixedPoint:
    one = 2.0**shift
    c, m, r = fixed_point_constants(affine.a / one, affine.b / one, residual_scale / one)
    return FixedPoint(((c - _HALF) << shift) + _HALF, m << shift, r << shift, shift)
