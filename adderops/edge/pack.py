"""Weights and constants of a layer as the words that the kernels read; the layouts are described in `c/layers.h`."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adderops.edge.fixed_point import Constants, adder_constants, product_constants
from adderops.edge.program import AdderConv, AdderSums, Counts, Floats, MultiplyConv, Output, Value, Window

Words = NDArray[np.uint32]

ORDERS = ("ORDER_TAPS", "ORDER_ROWS_1", "ORDER_ROWS_2")
MOST = 2**16 - 1  # of a size: the kernels hold them in 16 bits
MOST_DEPTHWISE = 257  # taps: sums of bytes in 16 bits
_SPANS = (4, 6, 9)  # words of x per tile and step, by order: 4 pixels, or the columns of 4 pixels
_STEP, _PAIR, _COPY = (
    (68, 48, 50),
    101,
    3,
)  # cycles of a step by order, of the rest of a pair of filters, of a word of x


@dataclass(frozen=True)
class Shape:
    """What a kernel is told about sizes: `height` x `width` x `channels` to `out_height` x `out_width` x `filters`."""

    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    filters: int
    window: Window

    @classmethod
    def of(cls, x: Value, filters: int, window: Window) -> "Shape":
        """Returns the sizes of a layer that reads x."""
        return cls(x.height, x.width, x.channels, *window.output(x.height, x.width), filters, window)

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.out_height * self.out_width


@dataclass(frozen=True, eq=False)
class Packed:
    """A convolution for its kernel.

    Attributes:
        shape: sizes, possibly other than the layer's: rows of one image row each become one long row, for example.
        words: of one filter.
        order: of the words, one of `ORDERS`.
        weights: all words of the layer.
        tile: bytes of scratch for the inputs of four pixels.
    """

    shape: Shape
    words: int
    order: int
    weights: Words
    tile: int


def whole(shape: Shape, weight: Tensor, groups: int) -> tuple[Shape, Tensor]:
    """Returns a layer whose window is all of its input as one of a single pixel: bytes lie there in the same order."""
    window = shape.window
    covers = window.kernel == (shape.height, shape.width) and not any(window.padding) and window.dilation == (1, 1)
    channels = shape.height * shape.width * shape.channels
    if groups > 1 or not covers or channels > MOST:
        return shape, weight
    flat = weight.permute(0, 2, 3, 1).reshape(len(weight), channels, 1, 1)
    return replace(shape, height=1, width=1, channels=channels, window=Window((1, 1))), flat


def one_row(shape: Shape) -> Shape:
    """Returns a 1x1 layer that keeps the size as one of a single row, so that no tile ends with an image row."""
    pixels = shape.height * shape.width
    if not shape.window.pointwise or pixels > MOST:
        return shape
    return replace(shape, height=1, width=pixels, out_height=1, out_width=pixels)


def best_order(shape: Shape, groups: int) -> int:
    """Returns the order of words that costs fewer cycles on a Cortex-M4, by the loops of `c/sums_m_assembly.c`.

    With the order of rows, neighbouring pixels share words, and a tile ends with its image row.
    """
    window, n = shape.window, shape.channels // groups
    if window.kernel[1] != 3 or window.dilation[1] > 1 or window.stride[1] > 2 or n % 4 > 0:
        return 0
    order, steps, pairs = window.stride[1], window.kernel[0] * n // 4, -(-shape.filters // groups // 2)
    words = -(-3 * steps // 4) * 4
    tiles_of_rows, tiles = shape.out_height * -(-shape.out_width // 4), -(-shape.pixels // 4)
    by_rows = tiles_of_rows * (pairs * (steps * _STEP[order] + _PAIR) + steps * _SPANS[order] * _COPY)
    by_taps = tiles * (pairs * (words / 4 * _STEP[0] + _PAIR) + words * 4 * _COPY)
    return order if by_rows <= by_taps else 0


def pack_adder(sums: AdderSums, shape: Shape, weight: Tensor, order: int, constants: Constants) -> Packed:
    """Returns the words of an adder convolution.

    Args:
        sums: the layer.
        shape, weight: its sizes and weights, possibly those of an equal layer.
        order: of the words.
        constants: of each filter, (C_out, n).
    """
    filters, n, height, width = weight.shape
    by_tap = np.zeros((filters, height, width, -(-n // 4) * 4), dtype=np.uint8)
    by_tap[..., :n] = weight.permute(0, 2, 3, 1).numpy()
    words = by_tap.reshape(filters, height, width, -1, 4).view("<u4")[..., 0]  # ky, kx, channel word
    if order:
        words = words.transpose(0, 1, 3, 2)  # ky, channel word, kx
    words = words.reshape(filters, -1)
    if not order:
        words = np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))
    count = words.shape[1]
    tile = 4 * _SPANS[order] * (count // 3 if order else count)
    per_group = filters // sums.groups
    parts = [
        _pairs(words[first : first + per_group], constants[first : first + per_group])
        for first in range(0, filters, per_group)
    ]
    return Packed(shape, count, order, np.concatenate(parts), tile)


def pack_depthwise(shape: Shape, weight: Tensor, constants: Constants) -> Packed:
    """Returns the words of a depthwise adder convolution: four channels a word, then their constants."""
    channels, taps = len(weight), weight[0].numel()
    filled = -(-channels // 4) * 4
    planes = np.zeros((filled, taps), dtype=np.uint8)
    planes[:channels] = weight.reshape(channels, taps).numpy()
    words = planes.reshape(-1, 4, taps).transpose(0, 2, 1).copy().view("<u4")[..., 0]
    padded = np.pad(constants, ((0, filled - channels), (0, 0))).reshape(len(words), -1)
    window = shape.window
    height = (shape.out_height - 1) * window.stride[0] + window.span[0]
    width = (shape.out_width - 1) * window.stride[1] + window.span[1]
    return Packed(shape, taps, 0, np.concatenate([words, padded], axis=1).reshape(-1), 4 + 4 * height * width)


def pack_multiply(layer: MultiplyConv, shape: Shape, weight: Tensor, constants: Constants) -> Packed:
    """Returns the words of a multiplying layer: two terms a word, then -zero_point * sum w, then constants."""
    terms = weight.permute(0, 2, 3, 1).reshape(len(weight), -1).to(torch.int16).numpy()
    words = np.ascontiguousarray(np.pad(terms, ((0, 0), (0, -terms.shape[1] % 4)))).view("<u4")
    outside = (-layer.zero_point * weight.long().flatten(1).sum(1)).to(torch.int32).numpy().view(np.uint32)
    return Packed(shape, words.shape[1], 0, _pairs(words, constants, outside[:, None]), 16 * words.shape[1])


def tile_of_outputs(filters: int, output: Output) -> int:
    """Returns the bytes of scratch for the outputs of four pixels."""
    size = 1 if not isinstance(output, (Floats, Counts)) else 4
    return -(-4 * size * (filters + 1) // 4) * 4


def constants_of(layer: AdderConv | MultiplyConv, epilogue: str) -> tuple[Constants, Constants | None]:
    """Returns each filter's constants, of the layer and of its shortcut: words (C_out, 2), fixed-point (C_out, 4)."""
    if epilogue == "integer" and not isinstance(layer.output, Floats):
        if isinstance(layer, MultiplyConv):
            return product_constants(layer).words, None
        fixed, beside = adder_constants(layer)
        return fixed.words, None if beside is None else beside.words
    width = 4 if epilogue == "integer" else 2
    if isinstance(layer, MultiplyConv):
        bias = torch.full_like(layer.scale, -0.0) if layer.bias is None else layer.bias
        return _floats(layer.scale, bias, width), None
    own = _floats(-layer.sums.scale, layer.sums.offset, width)
    return own, None if layer.shortcut is None else _floats(-layer.shortcut.scale, layer.shortcut.offset, width)


def _floats(a: Tensor, b: Tensor, width: int) -> Constants:
    words = torch.stack([a, b], dim=1).numpy().view(np.uint32)
    return np.pad(words, ((0, 0), (0, width - 2)))


def _pairs(words: Words, constants: Constants, before: Words | None = None) -> Words:
    """Returns the filters two by two: their words in turn, what stands `before` the constants, and the constants."""
    odd = len(words) % 2
    parts = []
    for block, each in ((words, True), (before, False), (constants, False)):
        if block is not None:
            padded = np.pad(block, ((0, odd), (0, 0)))
            pairs = padded.reshape(-1, 2, block.shape[1])
            parts.append((pairs.transpose(0, 2, 1) if each else pairs).reshape(len(pairs), -1))
    return np.concatenate(parts, axis=1).reshape(-1).astype(np.uint32)
