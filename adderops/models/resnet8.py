"""ResNet-8, the image classification network of MLPerf Tiny (github.com/mlcommons/tiny), in four widths."""

import torch.nn.functional as F
from torch import Tensor, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model
from adderops.models.resnet import BasicBlock


class ResNet8(nn.Module):
    """ResNet with three blocks of 16, 32 and 64 channels, small enough for a microcontroller.

    Stem conv 3x3, the blocks (the second and third have stride 2 and a 1x1 shortcut), average pooling, linear
    classifier `fc`. All layers of the blocks, shortcuts included, are of `kind`; stem and classifier are ordinary in
    both kinds. MLPerf Tiny's layers have biases and its shortcuts no BatchNorm; the multiply-accumulates are the same.

    Args:
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.
        width: factor of the channels of every layer, rounded down.

    Raises:
        ValueError: another kind, or a width that leaves none of the stem's 16 channels.

    >>> ResNet8("adder", width=0.5)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, kind: str = "adder", in_channels: int = 3, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        if not width >= 1 / 16:
            raise ValueError(f"width: expected at least 1/16, got {width}")
        first, second, third = (int(channels * width) for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.block1 = BasicBlock(layer, first, first, stride=1)
        self.block2 = BasicBlock(layer, first, second, stride=2)
        self.block3 = BasicBlock(layer, second, third, stride=2)
        self.fc = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W); MLPerf Tiny uses 32x32."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_model(image_size=32)
def resnet8(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNet8:
    """Builds ResNet-8 as an adder network (kind='adder') or as a CNN (kind='cnn').

    78,042 parameters; 12.50 M multiply-accumulates on a 32x32 image, 12.06 M of them in the 8 layers of `kind`.

    >>> sum(p.numel() for p in resnet8().parameters())
    78042
    """
    return ResNet8(kind, in_channels, num_classes)


@register_model(image_size=32)
def resnet8_x0_5(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNet8:
    """Builds ResNet-8 of half the width: 8, 16 and 32 channels; 3.24 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in resnet8_x0_5().parameters())
    19954
    """
    return ResNet8(kind, in_channels, num_classes, width=0.5)


@register_model(image_size=32)
def resnet8_x1_5(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNet8:
    """Builds ResNet-8 of 1.5 times the width: 24, 48 and 96 channels; 27.80 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in resnet8_x1_5().parameters())
    174274
    """
    return ResNet8(kind, in_channels, num_classes, width=1.5)


@register_model(image_size=32)
def resnet8_x2_0(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> ResNet8:
    """Builds ResNet-8 of twice the width: 32, 64 and 128 channels; 49.12 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in resnet8_x2_0().parameters())
    308650
    """
    return ResNet8(kind, in_channels, num_classes, width=2.0)
