"""Small networks of random structure: every kind of layer that can be exported, in every geometry."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.nn import AdderConv2d


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), without the ReLU sometimes."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, relu: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(y) if self.relu else y


class RandomNetworks:
    """A source of networks; the same seed gives the same network.

    Attributes:
        size: (channels, height, width) of the input of the network, and of its output while it grows.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.size = (self.random.choice([1, 2, 3, 4]), self.random.randint(7, 14), self.random.randint(7, 14))

    def network(self) -> tuple[nn.Module, tuple[int, int, int]]:
        """Returns a network and the size of its input."""
        size, choose = self.size, self.random
        layers: list[nn.Module] = [] if choose.random() < 0.2 else self._stem()
        layers += self._adder(choose.choice([4, 5, 8]), self._kernel())
        for _ in range(choose.randint(1, 4)):
            layers += self._block()
        network = nn.Sequential(*layers, *self._head())
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # gains of both signs
                nn.init.uniform_(module.weight, 0.5, 1.5)
                module.weight.data *= torch.where(torch.rand(module.num_features) < 0.2, -1.0, 1.0)
                nn.init.normal_(module.bias, 0.0, 0.5)
        return network, size

    def _stem(self) -> list[nn.Module]:
        kernel = self._kernel()
        filters = self.random.choice([3, 4, 6, 8])
        bias = self.random.random() < 0.5
        options = self._geometry(kernel)
        layer = nn.Conv2d(self.size[0], filters, kernel, bias=bias, **options)
        self._grow(filters, kernel, **options)
        return [layer, *([nn.BatchNorm2d(filters)] if self.random.random() < 0.7 else []), *self._relu()]

    def _block(self) -> list[nn.Module]:
        kinds = [
            "plain",
            "plain",
            "pointwise",
            "depthwise",
            "groups",
            "residual",
            "shortcut",
            "max pool",
            "average pool",
        ]
        kind = self.random.choice(kinds)
        channels = self.size[0]
        if kind == "max pool" or (kind == "average pool" and min(self.size[1:]) < 2):
            return [*self._max_pool(), *self._adder(channels, (1, 1))]
        if kind == "average pool":
            kernel = (2, self.random.randint(2, min(3, self.size[2])))
            stride = self.random.randint(1, 2)
            self._grow(channels, kernel, stride=(stride, stride))
            filters = self.random.choice([4, 5, 8])
            pool = nn.AvgPool2d(kernel, stride)
            return [pool, *self._adder(filters, (1, 1))]
        if kind == "depthwise":
            return self._adder(channels, self._kernel(), groups=channels)
        if kind == "groups":
            groups = next(g for g in (4, 3, 2, 1) if channels % g == 0)
            return self._adder(groups * self.random.randint(1, 3), self._kernel(), groups=groups)
        if kind == "residual":
            body = [*self._adder(self.random.choice([4, 5, 8]), (3, 3), padding=(1, 1))]
            body += self._adder(channels, *self.random.choice([((3, 3), (1, 1)), ((1, 1), (0, 0))]), relu=False)
            return [Residual(nn.Sequential(*body), None, self.random.random() < 0.7)]
        if kind == "shortcut":
            filters, stride = self.random.choice([4, 6, 7, 12]), self.random.randint(1, 2)
            shortcut = [AdderConv2d(channels, filters, 1, stride), nn.BatchNorm2d(filters)]
            body = self._adder(filters, (3, 3), padding=(1, 1), stride=(stride, stride))
            body += self._adder(filters, (3, 3), padding=(1, 1), relu=False)
            return [Residual(nn.Sequential(*body), nn.Sequential(*shortcut), self.random.random() < 0.7)]
        kernel = (1, 1) if kind == "pointwise" else self._kernel()
        return self._adder(self.random.choice([1, 2, 3, 4, 5, 7, 8, 12, 16]), kernel)

    def _adder(
        self,
        filters: int,
        kernel: tuple[int, int],
        padding: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        groups: int = 1,
        relu: bool | None = None,
    ) -> list[nn.Module]:
        if padding is None:
            options = self._geometry(kernel)
        else:
            options = {"stride": stride or (1, 1), "padding": padding, "dilation": (1, 1)}
        bias = self.random.random() < 0.3
        layer = AdderConv2d(self.size[0], filters, kernel, groups=groups, bias=bias, **options)
        nn.init.normal_(layer.weight, 0.0, 0.7)
        self._grow(filters, kernel, **options)
        norm = [nn.BatchNorm2d(filters)] if self.random.random() < 0.85 or not bias else []
        return [layer, *norm, *(self._relu() if relu is None else [])]

    def _max_pool(self) -> list[nn.Module]:
        kernel = self.random.randint(1, min(3, *self.size[1:]))
        stride, padding = self.random.randint(1, 2), self.random.randint(0, kernel // 2)
        pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=self.random.random() < 0.3)
        self.size = tuple(pool(torch.zeros(1, *self.size)).shape[1:])
        return [pool]

    def _head(self) -> list[nn.Module]:
        channels, height, width = self.size
        bias = self.random.random() < 0.8
        kind = self.random.choice(["pool", "pool", "flatten", "convolution"] if height * width > 3 else ["flatten"])
        if kind == "pool":
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5, bias)]
        if kind == "flatten":
            return [nn.Flatten(), nn.Linear(channels * height * width, 7, bias)]
        return [nn.Conv2d(channels, 3, (height, 1), bias=bias)]

    def _relu(self) -> list[nn.Module]:
        return [nn.ReLU()] if self.random.random() < 0.7 else []

    def _kernel(self) -> tuple[int, int]:
        most = min(5, self.size[1]), min(5, self.size[2])
        kernel = self.random.choice([(3, 3), (3, 3), (1, 1), (5, 5), (1, 3), (3, 1), (2, 4), (4, 2), (5, 3)])
        return min(kernel[0], most[0]), min(kernel[1], most[1])

    def _geometry(self, kernel: tuple[int, int]) -> dict[str, tuple[int, int]]:
        choose = self.random
        padding = tuple(choose.randint(0, k // 2) for k in kernel)
        most = [
            (size + 2 * p - 1) // (k - 1) if k > 1 else 1
            for size, p, k in zip(self.size[1:], padding, kernel, strict=True)
        ]
        dilation = tuple(min(choose.choice([1, 1, 1, 2]), max(1, m)) for m in most)
        stride = (1, 1) if min(self.size[1:]) < 4 else choose.choice([(1, 1), (1, 1), (2, 2), (1, 2), (2, 1)])
        return {"stride": stride, "padding": padding, "dilation": dilation}

    def _grow(
        self,
        filters: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.size[1:], padding, dilation, kernel, stride, strict=True)
        ]
        self.size = (filters, size[0], size[1])
