"""The grid of a layer: which float a byte stands for, and what is lost by it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adderops import reference


@dataclass(frozen=True)
class Grid:
    """x = scale * (X - zero_point) for X = 0 ... 2^bits - 1; one grid for the inputs and the weights of a layer.

    `sum |x - w| = scale * sum |X - W|` holds on no two different grids: the adder's price for integers.

    >>> grid = Grid.over(0.0, 127.5, 8)
    >>> grid.scale, grid.zero_point, grid.bytes(torch.tensor([-1.0, 0.6, 200.0])).tolist()
    (0.5, 0, [0, 1, 255])
    """

    scale: float
    zero_point: int
    bits: int

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> "Grid":
        """The grid from about `low` <= 0 to about `high` >= 0; 0 is on it exactly, and its scale is a float32."""
        scale = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32).item()
        return cls(scale, round(-low / scale), bits)

    @property
    def quant_max(self) -> int:
        """The largest byte."""
        return 2**self.bits - 1

    @property
    def low(self) -> float:
        """What byte 0 stands for."""
        return -self.scale * self.zero_point

    @property
    def high(self) -> float:
        """What the largest byte stands for."""
        return self.scale * (self.quant_max - self.zero_point)

    def beyond(self, stored: "Grid") -> "Grid | None":
        """The grid, from 0 on, of how far numbers of `stored` lie outside of this one; None where all are within."""
        most = max(stored.high - self.high, self.low - stored.low)
        return Grid.over(0.0, most, 8) if most > self.scale / 2 else None

    def bytes(self, x: Tensor) -> Tensor:
        """The nearest bytes."""
        return reference.quantize(x, self.scale, self.zero_point, self.quant_max)

    def floats(self, x: Tensor) -> Tensor:
        """What the bytes stand for."""
        return self.scale * (x.float() - self.zero_point)

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers of the grid; the gradient goes straight through, but for x beyond the grid."""
        rounded = torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, self.quant_max)
        return rounded.to(x.dtype)


def excess(w: Tensor, grid: Grid) -> Tensor:
    """Returns what clipping the filters (C_out, ...) to the grid takes off each distance: sum over k of |w - clip(w)|.

    For every x on the grid |x - w| = |x - clip(w)| + |w - clip(w)|: with minus this as a bias, clipping loses nothing.
    Inputs behind a ReLU are not negative, so neither need weights be, and the grid has all its steps where both are.

    >>> excess(torch.tensor([[-0.5, 0.5, 1.5]]), Grid.over(0.0, 1.0, 8))
    tensor([1.])
    """
    return (w - w.clamp(grid.low, grid.high)).abs().flatten(1).sum(1)


def cluster(values: Tensor, count: int) -> Tensor:
    """Returns the cluster of each number, 0 for the smallest: k-means in one dimension (Lloyd, from the quantiles).

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
