"""Layers that compute in floats what their integer counterparts will: for calibration, testing and fine-tuning."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.functional import adder_conv2d
from adderops.nn import AdderConv2d
from adderops.quant.grid import Grid, cluster, excess
from adderops.quant.scheme import Scheme

ENDS_BITS = 8  # of the layers that multiply
FLOAT_BITS = 32  # of layers that no batch reached: they stay in floats


class Quantized(nn.Module):
    """What the layers here share: the scheme, and what was seen of the inputs, in buffers that a state_dict carries."""

    plain_kind: type[nn.Module]
    scheme: Scheme
    input_low: Tensor
    input_high: Tensor
    bits: Tensor

    @classmethod
    def take_over(cls, layer: nn.Module, scheme: Scheme) -> None:
        """Makes a layer of `plain_kind` one of this class: it stays the same object, with its parameters and hooks."""
        layer.__class__ = cls
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
        self.__class__ = self.plain_kind
        del self.scheme, self.input_low, self.input_high, self.bits

    def plain(self) -> nn.Module:
        """A layer of `plain_kind` with the same numbers in parameters of its own, in evaluation mode."""
        layer = copy.copy(self)
        layer.__class__ = self.plain_kind
        layer._buffers = {}
        layer._parameters = {
            name: None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
            for name, value in self._parameters.items()
        }
        if isinstance(layer, AdderConv2d):
            layer.set_eta(None)
        return layer.eval()

    @property
    def calibrated(self) -> bool:
        return bool(self.input_high > self.input_low)

    @property
    def in_floats(self) -> bool:
        """Whether no calibration batch reached the layer (an auxiliary head, say), so that it is not quantized.

        `forward` asks this first, so it is what `torch.export` meets first, and refuses.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"{type(self).__name__}: expected the network that adderops.quant.convert makes of a calibrated one, "
                "got the calibrated one, whose grids follow from its weights at each call: convert before the export"
            )
        return bool(self.bits == FLOAT_BITS)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range from `low` <= 0 to `high` >= 0 that covers a batch of inputs but for those beyond the rank."""
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

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        bits, own = state_dict.get(prefix + "bits"), self._bits(self.scheme)
        if bits is not None and int(bits) not in (own, FLOAT_BITS):
            errors.append(f"{prefix}bits: expected {own}, got {int(bits)}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


class QuantAdderConv2d(Quantized, AdderConv2d):
    r"""An `AdderConv2d` whose inputs and weights are rounded to one grid, with gradients straight through.

    .. math:: Y = -\sum_k |Q(X) - Q(W)| - \sum_k |W - \mathrm{clip}(W)|

    The clip is that of the grid, the second sum one number for each filter: what clipped weights lack of every
    distance.  A module in evaluation gives what `adderops.quant.convert` makes of it, to the rounding of floats; in
    training its gradients are the layer's own (AdderNet's, not the derivative) at the rounded numbers, those of inputs
    beyond the grid 0.

    Made of an `AdderConv2d` by `adderops.quant.insert`; the grids follow from the scheme and what `observe` was given.

    Source: arXiv 2212.10200; that inputs of one sign need weights of one sign only is ours.
    """

    plain_kind = AdderConv2d

    def grids(self) -> list[tuple[Tensor, Grid]]:
        """Returns the filters of each group, and their grid."""
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
        """The grid in which the layer's input is stored: its own, or one of 8 bits that each group rounds again."""
        grids = self.grids()
        return grids[0][1] if len(grids) == 1 else Grid.over(self.input_low.item(), self.input_high.item(), 8)

    def forward(self, input: Tensor) -> Tensor:
        if self.in_floats:
            return AdderConv2d.forward(self, input)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        geometry = (self.stride, padding, self.dilation, self.groups)
        grids, weight = self.grids(), self.rated_weight()
        if len(grids) == 1:
            grid = grids[0][1]
            return adder_conv2d(grid.round(input), *self._rounded(weight, self.bias, grid), *geometry)
        stored = self.input_grid()
        x = stored.round(input)
        outputs = []
        for filters, grid in grids:
            bias = None if self.bias is None else self.bias[filters]
            y = adder_conv2d(grid.round(x), *self._rounded(weight[filters], bias, grid), *geometry)
            beyond = grid.beyond(stored)
            if beyond is not None:  # what inputs lose by clipping is the same for all filters
                clipped = (x - x.clamp(grid.low, grid.high)).abs()
                y = y + adder_conv2d(beyond.round(clipped), torch.zeros_like(weight[:1]), None, *geometry)
            outputs.append(y)
        order = torch.cat([filters for filters, _ in grids]).argsort().to(input.device)
        return torch.cat(outputs, 1).index_select(1, order)

    def _rounded(self, weight: Tensor, bias: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        """The weights on the grid, their gradient straight through, and the bias with what clipping takes off."""
        fixed = weight.detach()
        lost = -excess(fixed, grid)
        return weight + (grid.round(fixed) - fixed), lost if bias is None else bias + lost

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}"


class QuantizedEnd(Quantized):
    """First convolution or classifier: inputs on a grid, each filter on one of its own that has 0 in the middle."""

    @staticmethod
    def _bits(scheme: Scheme) -> int:
        return ENDS_BITS

    def input_grid(self) -> Grid:
        self._check_calibrated()
        return Grid.over(self.input_low.item(), self.input_high.item(), ENDS_BITS)

    def grids(self) -> list[tuple[Tensor, Grid]]:
        return [(torch.arange(len(self.weight)), self.input_grid())]

    def weight_scales(self) -> Tensor:
        """(C_out): what one step of each filter's grid is."""
        largest = self.weight.detach().abs().flatten(1).amax(1)
        return largest.clamp(min=torch.finfo(torch.float32).tiny) / (2 ** (ENDS_BITS - 1) - 1)

    def rounded_weight(self) -> Tensor:
        scales = self.weight_scales().view(-1, *(1,) * (self.weight.dim() - 1))
        w = self.weight
        return w + ((w.detach() / scales).round() * scales - w.detach())


class QuantConv2d(QuantizedEnd, nn.Conv2d):
    """A convolution with inputs and weights rounded to 8 bits, gradients straight through."""

    plain_kind = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        if self.in_floats:
            return super().forward(input)
        return self._conv_forward(self.input_grid().round(input), self.rounded_weight(), self.bias)


class QuantLinear(QuantizedEnd, nn.Linear):
    """A linear layer with inputs and weights rounded to 8 bits, gradients straight through."""

    plain_kind = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if self.in_floats:
            return super().forward(input)
        return F.linear(self.input_grid().round(input), self.rounded_weight(), self.bias)
