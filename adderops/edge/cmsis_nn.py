"""What an int8 CNN costs on a Cortex-M4 with CMSIS-NN, the library under TensorFlow Lite Micro: modelled, not measured.

Cycles a multiply-accumulate, for K = C_in/groups KH KW and C_out filters:

    KH KW > 1           1.626 + 73.3 / K + 9.24 / C_out     (the window is copied and widened, for all filters at once)
    1x1, and linear     1.860 + 36.9 / K,   and 0.986 more if strided
    depthwise           9.39

The constants are least squares fits of relative errors to instruction counts of CMSIS-NN main 99f736a (2026-07-15),
compiled by the best of seven compilers and options, and weighted with the cycles of Arm's manual: ten layers, at most
1.4 % off (tests/edge/test_cmsis_nn.py has them). K that is no multiple of 4 costs 1.24 times as much, by one layer
(3x3, 3 to 16 channels); a residual sum 92 cycles a value, by what is left of the count of a whole ResNet-8.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_UNALIGNED = 1.24
_DEPTHWISE = 9.39
_RESIDUAL_SUM = 92  # cycles a value
_PER_FILTER = 12  # bytes: bias, multiplier and shift


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Attributes:
        cycles: modelled, on a Cortex-M4.
        weights: bytes of weights and of the constants of each filter.
        scratch: bytes for widened windows, beside the activations.
    """

    cycles: int
    weights: int
    scratch: int


def convolution_cycles(
    terms: int, filters: int, pixels: int, *, window: bool = True, strided: bool = False, depthwise: bool = False
) -> float:
    """Returns the modelled cycles of a convolution or linear layer.

    Args:
        terms: K = C_in/groups KH KW.
        filters: C_out.
        pixels: OH OW; 1 for a linear layer.
        window: whether KH KW > 1.
        strided: whether the stride is more than 1.
        depthwise: whether each filter reads one channel of its own.

    >>> round(convolution_cycles(288, 32, 256) / (288 * 32 * 256), 2)
    2.17
    """
    if depthwise:
        cycles = _DEPTHWISE
    elif window:
        cycles = 1.626 + 73.3 / terms + 9.24 / filters
    else:
        cycles = 1.860 + 36.9 / terms + (0.986 if strided else 0.0)
    if terms % 4 and not depthwise:
        cycles *= _UNALIGNED
    return cycles * terms * filters * pixels


def cnn_cost(model: nn.Module, shape: Sequence[int]) -> Cost:
    """Returns what a CNN costs as an int8 network: its convolutions, linear layers and residual sums.

    BatchNorm is folded into the weights, ReLU into the layer before it; pooling is left out. No values are
    computed: a copy of the model in evaluation mode runs on the meta device.

    Args:
        model: a CNN with one input; it is left unchanged.
        shape: of an image, (C, H, W).

    Raises:
        ValueError: a transposed convolution, or one of other than two dimensions.

    >>> cnn_cost(nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()), (16, 10, 10)).weights
    4992
    """
    replica = copy.deepcopy(model).to("meta").eval()
    counter = _Counter()
    with torch.no_grad(), counter:
        replica(torch.empty((1, *shape), device="meta"))
    return Cost(round(counter.cycles), counter.weights, counter.scratch)


class _Counter(TorchDispatchMode):
    """Adds up what the operators cost that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.cycles, self.weights, self.scratch = 0.0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self._convolution(result, args[1], args[3], transposed=args[6], groups=args[8])
        elif func in (aten.addmm.default, aten.mm.default):
            weight = args[-1].T
            self._layer(weight, convolution_cycles(weight.size(1), weight.size(0), 1, window=False))
        elif func in (aten.add.Tensor, aten.add_.Tensor) and result.dim() == 4 and isinstance(args[1], Tensor):
            self.cycles += _RESIDUAL_SUM * result.numel()
        return result

    def _convolution(self, y: Tensor, weight: Tensor, stride: list[int], transposed: bool, groups: int) -> None:
        if transposed or weight.dim() != 4:
            raise ValueError(f"model: expected convolutions of two dimensions, got weights {tuple(weight.shape)}")
        filters, channels, height, width = weight.shape
        terms, pixels = channels * height * width, math.prod(y.shape[2:])
        depthwise, window = groups > 1 and channels == 1, height * width > 1
        cycles = convolution_cycles(terms, filters, pixels, window=window, strided=max(stride) > 1, depthwise=depthwise)
        self._layer(weight, cycles)
        if window and not depthwise:
            self.scratch = max(self.scratch, 4 * terms)  # two windows in int16

    def _layer(self, weight: Tensor, cycles: float) -> None:
        self.weights += weight.numel() + _PER_FILTER * len(weight)
        self.cycles += cycles
