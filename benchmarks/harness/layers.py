"""Real layers to time: the distinct convolutions of ResNet-20, ResNet-18 and ResNet-50.

Stem and classifier are left out: an adder network keeps them as convolutions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A square convolution with padding kernel // 2, and its batch size."""

    network: str
    batch: int
    c_in: int
    c_out: int
    size: int  # H = W of the input
    kernel: int
    stride: int = 1

    @property
    def name(self) -> str:
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return f"{self.network}/{self.c_in}-{self.c_out}.{self.kernel}x{self.kernel}{stride}@{self.size}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def terms(self) -> int:
        """|x - w| per pass: as many as the multiply-accumulates of a convolution."""
        return self.batch * self.out_size**2 * self.c_out * self.c_in * self.kernel**2

    def batch_within(self, terms: int) -> "Layer":
        """The same layer with the largest batch, at least one image, that stays within `terms`."""
        return replace(self, batch=max(1, min(self.batch, terms * self.batch // self.terms)))

    def tensors(self, memory_format: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor, Tensor]:
        """(x, w, grad_y), the same numbers in every call: w and grad_y are normal, x is the ReLU of normal numbers."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.c_in, self.size, self.size, generator=generator).relu_()
        w = torch.randn(self.c_out, self.c_in, self.kernel, self.kernel, generator=generator)
        grad_y = torch.randn(self.batch, self.c_out, self.out_size, self.out_size, generator=generator)
        x, w, grad_y = (t.contiguous(memory_format=memory_format) for t in (x, w, grad_y))
        return x, w, grad_y


def _resnet20(batch: int) -> list[Layer]:
    """The CIFAR network of He et al., 2015, with projection shortcuts."""
    layers = [Layer("resnet20", batch, 16, 16, 32, 3)]
    for c_in, size in ((16, 32), (32, 16)):
        layers += [
            Layer("resnet20", batch, c_in, 2 * c_in, size, 3, 2),
            Layer("resnet20", batch, 2 * c_in, 2 * c_in, size // 2, 3),
            Layer("resnet20", batch, c_in, 2 * c_in, size, 1, 2),
        ]
    return layers


def _resnet18(batch: int) -> list[Layer]:
    layers = [Layer("resnet18", batch, 64, 64, 56, 3)]
    for c_in, size in ((64, 56), (128, 28), (256, 14)):
        layers += [
            Layer("resnet18", batch, c_in, 2 * c_in, size, 3, 2),
            Layer("resnet18", batch, 2 * c_in, 2 * c_in, size // 2, 3),
            Layer("resnet18", batch, c_in, 2 * c_in, size, 1, 2),
        ]
    return layers


def _resnet50(batch: int) -> list[Layer]:
    """Bottlenecks with the stride in the 3x3 layer, as in torchvision."""
    layers = []
    c_in, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        out = size // stride
        block = [
            Layer("resnet50", batch, c_in, width, size, 1),  # first block: reduce, 3x3, shortcut
            Layer("resnet50", batch, width, width, size, 3, stride),
            Layer("resnet50", batch, c_in, 4 * width, size, 1, stride),
            Layer("resnet50", batch, 4 * width, width, out, 1),  # the other blocks: reduce, 3x3, expand
            Layer("resnet50", batch, width, width, out, 3),
            Layer("resnet50", batch, width, 4 * width, out, 1),
        ]
        layers += block
        c_in, size = 4 * width, out
    return list(dict.fromkeys(layers))  # two places in a stage may hold the same layer


LAYERS = tuple(_resnet20(128) + _resnet18(8) + _resnet50(4))


def named(patterns: str) -> Sequence[Layer]:
    """The layers that match one of some patterns, separated by commas; ends the program if none does."""
    layers = [layer for layer in LAYERS if any(fnmatch(layer.name, pattern) for pattern in patterns.split(","))]
    if not layers:
        known = ", ".join(layer.name for layer in LAYERS)
        raise SystemExit(f"--layers: no layer matches {patterns}; there are {known}")
    return layers


# The layers of a run without --full: all of ResNet-20, and one layer of each kind from the other two networks.
_DEFAULT = (
    "resnet18/64-64.3x3@56",
    "resnet18/64-128.3x3s2@56",
    "resnet18/128-256.1x1s2@28",
    "resnet18/256-256.3x3@14",
    "resnet18/512-512.3x3@7",
    "resnet50/64-256.1x1@56",
    "resnet50/256-64.1x1@56",
    "resnet50/128-128.3x3s2@56",
    "resnet50/512-1024.1x1s2@28",
    "resnet50/1024-256.1x1@14",
    "resnet50/2048-512.1x1@7",
)
DEFAULT_LAYERS = tuple(layer for layer in LAYERS if layer.network == "resnet20" or layer.name in _DEFAULT)
