"""ResNets for CIFAR and ImageNet, as in the AdderNet reference code (github.com/huawei-noah/AdderNet).

Module names are those of resnet20.py and resnet50.py there, so that their checkpoints load.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model

_Layer = Callable[..., nn.Module]


def _projection(layer: _Layer, in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Returns the 1x1 layer of a shortcut with its BatchNorm; None if the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    shortcut = layer(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 layers with a shortcut: relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x)).

    (N, in_channels, H, W) -> (N, channels, H/stride, W/stride), rounded up. The first layer has the stride.

    Args:
        layer: class of the layers: `AdderConv2d` or `nn.Conv2d`.
        in_channels, channels, stride: of the block.

    >>> BasicBlock(nn.Conv2d, 16, 32, stride=2)(torch.zeros(1, 16, 32, 32)).shape
    torch.Size([1, 32, 16, 16])
    """

    expansion = 1

    def __init__(self, layer: _Layer, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = layer(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = layer(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(layer, in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 layers with a shortcut; the 3x3 layer has the stride, the last layer 4 * channels filters.

    (N, in_channels, H, W) -> (N, 4 * channels, H/stride, W/stride), rounded up.

    Args:
        layer: class of the layers: `AdderConv2d` or `nn.Conv2d`.
        in_channels, channels, stride: of the block.

    >>> Bottleneck(nn.Conv2d, 64, 32, stride=2)(torch.zeros(1, 64, 32, 32)).shape
    torch.Size([1, 128, 16, 16])
    """

    expansion = 4

    def __init__(self, layer: _Layer, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = layer(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = layer(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = layer(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(layer, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the block."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + shortcut)


_Block = type[BasicBlock] | type[Bottleneck]


def _stage(layer: _Layer, block: _Block, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Returns a sequence of blocks; the first takes in_channels and has the stride."""
    first = block(layer, in_channels, channels, stride)
    return nn.Sequential(
        first, *(block(layer, block.expansion * channels, channels, stride=1) for _ in range(1, blocks))
    )


class ResNetCIFAR(nn.Module):
    """ResNet with three stages of 16, 32 and 64 channels, as in the reference code.

    Stem conv 3x3, the stages (the first block of the second and third has stride 2 and a 1x1 shortcut), average
    pooling, classifier `fc` (a 1x1 convolution without bias), and `bn2`, a BatchNorm on the logits. All layers of the
    stages are of `kind`; stem and classifier are ordinary convolutions in both kinds.

    Args:
        kind: 'adder' or 'cnn'.
        blocks: number of blocks per stage.
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        ValueError: another kind.

    >>> ResNetCIFAR("adder", (1, 1, 1))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, kind: str, blocks: tuple[int, int, int], in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(layer, BasicBlock, 16, 16, blocks[0], stride=1)
        self.layer2 = _stage(layer, BasicBlock, 16, 32, blocks[1], stride=2)
        self.layer3 = _stage(layer, BasicBlock, 32, 64, blocks[2], stride=2)
        self.fc = nn.Conv2d(64, num_classes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W); the reference uses 32x32."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.bn2(self.fc(F.adaptive_avg_pool2d(x, 1))).flatten(1)


class ResNetImageNet(nn.Module):
    """ResNet with four stages of 64, 128, 256 and 512 channels, as in the reference code.

    Stem conv 7x7 of stride 2 and 3x3 max pooling of stride 2, the stages (the first block of the last three has stride
    2), average pooling, classifier `fc` (a 1x1 convolution with bias), and `bn2`, a BatchNorm on the logits. All layers
    of the stages, shortcuts included, are of `kind`; stem and classifier are ordinary convolutions in both kinds.
    Convolutions are drawn from He's normal distribution by fan-out, adder layers from N(0, 1).

    Args:
        kind: 'adder' or 'cnn'.
        block: BasicBlock or Bottleneck.
        blocks: number of blocks per stage.
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        ValueError: another kind.

    >>> ResNetImageNet("cnn", BasicBlock, (1, 1, 1, 1))(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1000])
    """

    def __init__(
        self,
        kind: str,
        block: _Block,
        blocks: tuple[int, int, int, int],
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        widen = block.expansion
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(layer, block, 64, 64, blocks[0], stride=1)
        self.layer2 = _stage(layer, block, 64 * widen, 128, blocks[1], stride=2)
        self.layer3 = _stage(layer, block, 128 * widen, 256, blocks[2], stride=2)
        self.layer4 = _stage(layer, block, 256 * widen, 512, blocks[3], stride=2)
        self.fc = nn.Conv2d(512 * widen, num_classes, 1)
        self.bn2 = nn.BatchNorm2d(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W); the reference uses 224x224."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.bn2(self.fc(F.adaptive_avg_pool2d(x, 1))).flatten(1)


@register_model(image_size=32)
def resnet20(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNetCIFAR:
    """Builds ResNet-20 as an adder network (kind='adder') or as a CNN (kind='cnn').

    272,484 parameters; 40.81 M multiply-accumulates on a 32x32 image, 40.37 M of them in the 20 layers of `kind`.
    (AdderNet's table says 41.17 M.)

    >>> sum(p.numel() for p in resnet20().parameters())
    272484
    """
    return ResNetCIFAR(kind, (3, 3, 3), in_channels, num_classes)


@register_model(image_size=32)
def resnet32(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNetCIFAR:
    """Builds ResNet-32 as an adder network (kind='adder') or as a CNN (kind='cnn').

    466,916 parameters; 69.12 M multiply-accumulates on a 32x32 image, 68.68 M of them in the 32 layers of `kind`.

    >>> sum(p.numel() for p in resnet32().parameters())
    466916
    """
    return ResNetCIFAR(kind, (5, 5, 5), in_channels, num_classes)


@register_model(image_size=224)
def resnet18(kind: str = "adder", in_channels: int = 3, num_classes: int = 1000) -> ResNetImageNet:
    """Builds ResNet-18 as an adder network (kind='adder') or as a CNN (kind='cnn').

    11,691,512 parameters; 1.81 G multiply-accumulates on a 224x224 image, 1.70 G of them in the 19 layers of `kind`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in resnet18().parameters())
    11691512
    """
    return ResNetImageNet(kind, BasicBlock, (2, 2, 2, 2), in_channels, num_classes)


@register_model(image_size=224)
def resnet50(kind: str = "adder", in_channels: int = 3, num_classes: int = 1000) -> ResNetImageNet:
    """Builds ResNet-50 as an adder network (kind='adder') or as a CNN (kind='cnn').

    25,559,032 parameters; 4.09 G multiply-accumulates on a 224x224 image, 3.97 G of them in the 52 layers of `kind`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in resnet50().parameters())
    25559032
    """
    return ResNetImageNet(kind, Bottleneck, (3, 4, 6, 3), in_channels, num_classes)
