"""Fake-quantized layers, for calibration, testing and fine-tuning: they round inputs and weights in floating point."""

import copy
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.functional import adder_conv2d
from adderops.nn import AdderConv2d
from adderops.quant.grid import Grid, cluster, excess
from adderops.quant.scheme import Scheme

ENDS_BITS = 8  # of the first convolution and the classifier, which multiply
FLOAT_BITS = 32  # marks a layer that no calibration batch reached: it is not quantized


class Quantized(nn.Module):
    """Base of the fake-quantized layers: the scheme, and the observed range of the inputs in buffers of the state_dict.

    Attributes:
        plain_kind: the ordinary layer class that a class quantizes.
        scheme: options of the quantization.
        input_low, input_high: observed range of the inputs, float32 scalars; input_low <= 0 <= input_high.
        bits: int64 scalar.
    """

    plain_kind: type[nn.Module]
    weight: Tensor
    scheme: Scheme
    input_low: Tensor
    input_high: Tensor
    bits: Tensor

    @classmethod
    def take_over(cls, layer: nn.Module, scheme: Scheme) -> None:
        """Turns a layer of `plain_kind` into this class; it stays the same object, with its parameters and hooks."""
        layer.__class__ = cls
        assert isinstance(layer, Quantized)
        layer.scheme = scheme
        device = layer.weight.device
        layer.register_buffer("input_low", torch.zeros((), device=device))
        layer.register_buffer("input_high", torch.zeros((), device=device))
        layer.register_buffer("bits", torch.tensor(cls._bits(scheme), device=device))

    @staticmethod
    def _bits(scheme: Scheme) -> int:
        return scheme.bits

    def give_back(self) -> None:
        """Undoes `take_over`."""
        layer: nn.Module = self
        layer.__class__ = self.plain_kind
        del self.scheme, self.input_low, self.input_high, self.bits

    def plain(self) -> nn.Module:
        """Returns a layer of `plain_kind` with the same values in new parameters, in evaluation mode."""
        layer: nn.Module = copy.copy(self)
        layer.__class__ = self.plain_kind
        layer._buffers = {}
        layer._parameters = {
            name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
            for name, value in self._parameters.items()
        }
        if isinstance(layer, AdderConv2d):
            layer.set_eta(None)
        return layer.eval()

    @abstractmethod
    def grids(self) -> list[tuple[Tensor, Grid]]:
        """Returns (indices of the filters, grid) per group of filters."""

    @abstractmethod
    def input_grid(self) -> Grid:
        """Returns the grid of the stored input."""

    @property
    def calibrated(self) -> bool:
        """Whether a range of inputs has been observed."""
        return bool(self.input_high > self.input_low)

    @property
    def in_floats(self) -> bool:
        """Whether the layer is not quantized because no calibration batch reached it, as in an auxiliary head.

        Raises RuntimeError under `torch.export`: `forward` reads this first, so the refusal comes before other errors.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"{type(self).__name__}: expected the network that adderops.quant.convert makes of a calibrated one, "
                "got the calibrated one, whose grids follow from its weights at each call: convert before the export"
            )
        return bool(self.bits == FLOAT_BITS)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the range of a batch of inputs, low <= 0 and high >= 0, without the magnitudes beyond the rank."""
        x = x.detach().flatten().float()
        magnitude = x.abs()
        rank = self.scheme.rank if self.scheme.method == "redistribution" else 1.0
        covered = magnitude.kthvalue(max(1, round(rank * magnitude.numel()))).values
        return torch.maximum(x.amin(), -covered).clamp(max=0), torch.minimum(x.amax(), covered).clamp(min=0)

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise RuntimeError(
                f"{type(self).__name__}: expected a layer that has seen inputs, got a range of 0: "
                "calibrate the model first, with inputs that are not all 0"
            )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        bits, own = state_dict.get(prefix + "bits"), self._bits(self.scheme)
        if bits is not None and int(bits) not in (own, FLOAT_BITS):
            errors.append(f"{prefix}bits: expected {own}, got {int(bits)}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class QuantAdderConv2d(Quantized, AdderConv2d):
    r"""A fake-quantized `AdderConv2d`: inputs and weights are rounded to one grid, with straight-through gradients.

    .. math:: Y = -\sum_k |Q(X) - Q(W)| - \sum_k |W - \mathrm{clip}(W)|

    Q rounds to the grid, clip clips to its range. The second sum is one number per filter: what clipping the weights
    takes off every distance. In evaluation mode the output equals that of the integer layer which
    `adderops.quant.convert` makes, up to float32 rounding. In training the gradients are AdderNet's, on purpose not
    the derivative, at the rounded values; inputs outside the grid get 0.

    `adderops.quant.insert` turns an `AdderConv2d` into this; the grids follow from the scheme and from what `observe`
    has seen.

    Source: arXiv 2212.10200. That inputs of one sign need weights of one sign only is our addition.
    """

    plain_kind = AdderConv2d

    def grids(self) -> list[tuple[Tensor, Grid]]:
        """Returns (indices of the filters, grid) per group of filters."""
        self._check_calibrated()
        w, scheme = self.weight.detach(), self.scheme
        low, high = self.input_low.item(), self.input_high.item()
        if scheme.method == "shared":
            low, high = min(low, w.min().item(), 0.0), max(high, w.max().item())
        every = torch.arange(len(w))
        if scheme.filter_groups == 1 or self.groups > 1:
            return [(every, Grid.over(low, high, scheme.bits))]
        largest = w.abs().flatten(1).amax(1).cpu()
        group = cluster(largest, scheme.filter_groups)
        return [
            (every[group == g], Grid.over(max(low, -bound), min(high, bound), scheme.bits))
            for g in range(int(group.max()) + 1)
            for bound in [largest[group == g].max().item()]
        ]

    def input_grid(self) -> Grid:
        """Returns the grid of the stored input: the layer's only one, or one of 8 bits that each group rounds again."""
        grids = self.grids()
        return grids[0][1] if len(grids) == 1 else Grid.over(self.input_low.item(), self.input_high.item(), 8)

    def forward(self, input: Tensor) -> Tensor:
        """Returns what the integer layer will compute, in floating point; shapes as `AdderConv2d`."""
        if self.in_floats:
            return AdderConv2d.forward(self, input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        convolve = partial(
            adder_conv2d, stride=self.stride, padding=padding, dilation=self.dilation, groups=self.groups
        )
        grids, weight = self.grids(), self.rated_weight()
        if len(grids) == 1:
            grid = grids[0][1]
            return convolve(grid.round(input), *self._rounded(weight, self.bias, grid))
        stored = self.input_grid()
        x = stored.round(input)
        outputs = []
        for filters, grid in grids:
            bias = None if self.bias is None else self.bias[filters]
            y = convolve(grid.round(x), *self._rounded(weight[filters], bias, grid))
            beyond = grid.beyond(stored)
            if beyond is not None:  # what clipping takes off the inputs is the same for all filters
                clipped = (x - x.clamp(grid.low, grid.high)).abs()
                y = y + convolve(beyond.round(clipped), torch.zeros_like(weight[:1]))
            outputs.append(y)
        order = torch.cat([filters for filters, _ in grids]).argsort().to(input.device)
        return torch.cat(outputs, 1).index_select(1, order)

    def _rounded(self, weight: Tensor, bias: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """Returns the rounded weights, with straight-through gradient, and the bias less what clipping takes off."""
        fixed = weight.detach()
        lost = -excess(fixed, grid)
        return weight + (grid.round(fixed) - fixed), lost if bias is None else bias + lost

    def extra_repr(self) -> str:
        """Returns the arguments that `repr` shows."""
        return f"{super().extra_repr()}, {self.scheme}"


class QuantizedEnd(Quantized):
    """A fake-quantized first convolution or classifier: one grid for the inputs, a symmetric one per filter."""

    @staticmethod
    def _bits(scheme: Scheme) -> int:
        return ENDS_BITS

    def input_grid(self) -> Grid:
        """Returns the grid of the inputs."""
        self._check_calibrated()
        return Grid.over(self.input_low.item(), self.input_high.item(), ENDS_BITS)

    def grids(self) -> list[tuple[Tensor, Grid]]:
        """Returns (indices of all filters, grid of the inputs)."""
        return [(torch.arange(len(self.weight)), self.input_grid())]

    def weight_scales(self) -> Tensor:
        """Returns the step of the grid of each filter: (C_out), in units of the weights."""
        largest = self.weight.detach().abs().flatten(1).amax(1)
        return largest.clamp(min=torch.finfo(torch.float32).tiny) / (2 ** (ENDS_BITS - 1) - 1)

    def rounded_weight(self) -> Tensor:
        """Returns the weights on their grids, with straight-through gradient."""
        scales = self.weight_scales().view(-1, *(1,) * (self.weight.dim() - 1))
        w = self.weight
        return w + ((w.detach() / scales).round() * scales - w.detach())


class QuantConv2d(QuantizedEnd, nn.Conv2d):
    """A fake-quantized `nn.Conv2d`: inputs and weights are rounded to 8 bits, with straight-through gradients."""

    plain_kind = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """Returns the convolution of rounded inputs with rounded weights; shapes as `nn.Conv2d`."""
        if self.in_floats:
            return super().forward(input)
        return self._conv_forward(self.input_grid().round(input), self.rounded_weight(), self.bias)


class QuantLinear(QuantizedEnd, nn.Linear):
    """A fake-quantized `nn.Linear`: inputs and weights are rounded to 8 bits, with straight-through gradients."""

    plain_kind = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Returns the product of rounded inputs and rounded weights; shapes as `nn.Linear`."""
        if self.in_floats:
            return super().forward(input)
        return F.linear(self.input_grid().round(input), self.rounded_weight(), self.bias)
