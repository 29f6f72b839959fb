"""ResNet-20 in the CIFAR form of the AdderNet reference code (github.com/huawei-noah/AdderNet, resnet20.py).

Module names are those of the reference, so that its checkpoints load.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from adderops.models.kinds import layer_of_kind


class BasicBlock(nn.Module):
    """Two 3x3 layers with a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))."""

    def __init__(self, layer: Callable[..., nn.Module], in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layer(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = layer(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = layer(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def matched_layers(self) -> list[nn.Module]:
        return [self.conv1, self.conv2] + ([] if self.downsample is None else [self.downsample[0]])

    def forward(self, x: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
        """Returns the block's activation; appends the raw outputs of its matched layers to `outputs` if given."""
        y1 = self.conv1(x)
        y2 = self.conv2(F.relu(self.bn1(y1)))
        raw, shortcut = [y1, y2], x
        if self.downsample is not None:
            projection, norm = self.downsample
            raw.append(projection(x))
            shortcut = norm(raw[-1])
        if outputs is not None:
            outputs.extend(raw)
        return F.relu(self.bn2(y2) + shortcut)


class ResNetCIFAR(nn.Module):
    """ResNet of three stages with 16, 32 and 64 channels, as in the reference code.

    Stem conv 3x3, the stages (the first block of the second and third has stride 2 and a 1x1 shortcut), average pool,
    classifier `fc` = 1x1 convolution without bias, then `bn2` = BatchNorm on the logits.  All 3x3 and 1x1 layers of the
    stages are of `kind`; stem and classifier are ordinary convolutions in both kinds.

    Args:
        kind: 'adder' or 'cnn'.
        blocks: number of blocks of each stage.
        in_channels: of the images.
        num_classes: number of logits.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: str, blocks: tuple[int, int, int], in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(layer, 16, 16, blocks[0], stride=1)
        self.layer2 = self._stage(layer, 16, 32, blocks[1], stride=2)
        self.layer3 = self._stage(layer, 32, 64, blocks[2], stride=2)
        self.fc = nn.Conv2d(64, num_classes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_classes)

    @staticmethod
    def _stage(layer, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(layer, in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(layer, channels, channels, 1) for _ in range(1, blocks)))

    def _blocks(self) -> list[BasicBlock]:
        return [*self.layer1, *self.layer2, *self.layer3]

    def matched_layers(self) -> list[nn.Module]:
        """Returns the layers whose raw outputs `forward(x, intermediates=True)` returns, in that order."""
        return [layer for block in self._blocks() for layer in block.matched_layers()]

    def forward(self, x: Tensor, intermediates: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W); the reference uses 32x32.

        With intermediates=True returns (logits, outputs): the outputs of the matched layers before BatchNorm and ReLU.
        """
        outputs: list[Tensor] | None = [] if intermediates else None
        x = F.relu(self.bn1(self.conv1(x)))
        for block in self._blocks():
            x = block(x, outputs)
        logits = self.bn2(self.fc(F.adaptive_avg_pool2d(x, 1))).flatten(1)
        return (logits, outputs) if intermediates else logits


def resnet20(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNetCIFAR:
    """Builds ResNet-20 as adder network (kind='adder') or as CNN (kind='cnn').

    >>> sum(p.numel() for p in resnet20().parameters())
    272484
    """
    return ResNetCIFAR(kind, (3, 3, 3), in_channels, num_classes)
