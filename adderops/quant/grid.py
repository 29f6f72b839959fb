"""The quantization grid of a layer: which number each integer stands for, and what clipping to the grid costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adderops.functional import quantize


@dataclass(frozen=True)
class Grid:
    """The numbers x = scale * (X - zero_point) for X = 0 ... 2^bits - 1, shared by a layer's inputs and weights.

    They must share it: `sum |x - w| = scale * sum |X - W|` holds only if both are on the same grid. That is the price
    of integers in an adder layer.

    Attributes:
        scale: the step between neighbouring numbers, in units of x; positive.
        zero_point: the integer that stands for 0.
        bits: 2 to 8.

    >>> grid = Grid.over(0.0, 127.5, 8)
    >>> grid.scale, grid.zero_point, grid.bytes(torch.tensor([-1.0, 0.6, 200.0])).tolist()
    (0.5, 0, [0, 1, 255])
    """

    scale: float
    zero_point: int
    bits: int

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Grid":
        """Returns the grid from about `low` <= 0 to about `high` >= 0.

        It contains 0 exactly, which moves both ends by less than a step. The scale is a float32.
        """
        scale = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32).item()
        return cls(scale, round(-low / scale), bits)

    @property
    def quant_max(self) -> int:
        """The largest integer, 2^bits - 1."""
        return 2**self.bits - 1

    @property
    def low(self) -> float:
        """The smallest number, which the integer 0 stands for."""
        return -self.scale * self.zero_point

    @property
    def high(self) -> float:
        """The largest number, which `quant_max` stands for."""
        return self.scale * (self.quant_max - self.zero_point)

    def beyond(self, stored: "Grid") -> "Grid | None":
        """Returns an 8-bit grid for the distance by which numbers of `stored` lie outside this grid.

        None if all of them lie within half a step of this grid.
        """
        most = max(stored.high - self.high, self.low - stored.low)
        return Grid.over(0.0, most, 8) if most > self.scale / 2 else None

    def bytes(self, x: Tensor) -> Tensor:
        """Returns the integers nearest to x, uint8, of the shape of x."""
        images = x.float().reshape(1, 1, 1, -1)  # the operator takes four dimensions
        return quantize(images, self.scale, self.zero_point, self.quant_max).reshape(x.shape)

    def floats(self, x: Tensor) -> Tensor:
        """Returns the numbers that integers stand for, in float32."""
        return self.scale * (x.float() - self.zero_point)

    def round(self, x: Tensor) -> Tensor:
        """Returns the numbers of the grid nearest to x, in the dtype of x.

        The gradient is straight-through: that of the identity inside the grid, 0 outside.
        """
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, self.quant_max)
        return rounded.to(x.dtype)


def excess(w: Tensor, grid: Grid) -> Tensor:
    """Returns by how much clipping the filters to the grid shortens each distance: sum_k |w - clip(w)|.

    |x - w| = |x - clip(w)| + |w - clip(w)| for every x on the grid, so clipping is exact with minus this sum as a bias.
    Inputs after a ReLU are never negative, so their weights need not be either: all steps of the grid then cover the
    range that both have in common.

    Shapes: w (C_out, ...) -> (C_out).

    >>> excess(torch.tensor([[-0.5, 0.5, 1.5]]), Grid.over(0.0, 1.0, 8))
    tensor([1.])
    """
    return (w - w.clamp(grid.low, grid.high)).abs().flatten(1).sum(1)


def cluster(values: Tensor, count: int) -> Tensor:
    """Returns the cluster of each value, 0 for the smallest: 1-d k-means by Lloyd's algorithm, started at quantiles.

    Shapes: values (n) -> (n), int64. There are `count` clusters, fewer if there are not as many different values.

    >>> cluster(torch.tensor([1.0, 9.0, 1.2, 8.0]), 2)
    tensor([0, 1, 0, 1])
    """
    values = values.double()
    centres = values.unique().quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count).unique()
    for _ in range(100):
        nearest = (values[:, None] - centres).abs().argmin(1)
        moved = torch.stack([values[nearest == i].mean() for i in nearest.unique()])
        if torch.equal(moved, centres):
            break
        centres = moved
    return nearest
