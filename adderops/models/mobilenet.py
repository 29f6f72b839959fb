"""MobileNet (arXiv 1704.04861) for small images, and DS-CNN: depthwise separable layers, both of the network's kind."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model

# per block: channels of the pointwise layer, stride of the depthwise layer
_CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class DepthwiseSeparable(nn.Module):
    """A 3x3 layer per channel, then a 1x1 layer across the channels; BatchNorm and ReLU after each."""

    def __init__(self, layer: Callable[..., nn.Module], in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = layer(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = layer(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, channels, H/stride, W/stride), rounded up, for x (N, in_channels, H, W)."""
        x = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(x)))


class MobileNet(nn.Module):
    """MobileNet with 13 depthwise separable blocks and a stem of stride 1; the paper's stem has stride 2.

    So the stages see a 32x32 image at 32, 16, 8, 4 and 2 pixels. Stem conv 3x3, the blocks, average pooling, linear
    classifier `fc`. Depthwise and pointwise layers are of `kind`; stem and classifier are ordinary in both kinds.

    Args:
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.
        width: factor of the channels of every layer (the paper's alpha: 1, 0.75, 0.5, 0.25), rounded down.

    Raises:
        ValueError: another kind, or a width that leaves none of the stem's 32 channels.

    >>> MobileNet("adder", width=0.25)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, kind: str = "adder", in_channels: int = 3, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        if not width >= 1 / 32:
            raise ValueError(f"width: expected at least 1/32, got {width}")
        channels = int(32 * width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential()
        for full_width, stride in zip(_CHANNELS, _STRIDES, strict=True):
            in_channels, channels = channels, int(full_width * width)
            self.blocks.append(DepthwiseSeparable(layer, in_channels, channels, stride))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_model(image_size=32)
def mobilenet(kind: str = "adder", in_channels: int = 3, num_classes: int = 10, width: float = 1.0) -> MobileNet:
    """Builds MobileNet as an adder network (kind='adder') or as a CNN (kind='cnn').

    With width 1: 3,217,226 parameters; 46.35 M multiply-accumulates on a 32x32 image, 45.46 M of them in the 26 layers
    of `kind`.

    >>> sum(p.numel() for p in mobilenet(width=0.25).parameters())
    215642
    """
    return MobileNet(kind, in_channels, num_classes, width)


class DSCNN(nn.Module):
    """DS-CNN (arXiv 1711.07128), the keyword spotting network of MLPerf Tiny, here for images.

    Four depthwise separable blocks, all of 64 channels at half the size of the image.

    Stem conv 3x3 of stride 2, the blocks, average pooling, linear classifier `fc`. Depthwise and pointwise layers are
    of `kind`; stem and classifier are ordinary in both kinds. The stem of MLPerf Tiny, for 49x10 spectrograms, is a
    conv 10x4 of stride 2; its layers have biases, and dropout precedes the classifier.

    Args:
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.
        width: factor of the channels of every layer, rounded down.

    Raises:
        ValueError: another kind, or a width that leaves none of the 64 channels.

    >>> DSCNN("adder", width=0.5)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, kind: str = "adder", in_channels: int = 3, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        if not width >= 1 / 64:
            raise ValueError(f"width: expected at least 1/64, got {width}")
        channels = int(64 * width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(DepthwiseSeparable(layer, channels, channels, stride=1) for _ in range(4)))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, H, W)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


@register_model(image_size=32)
def ds_cnn(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> DSCNN:
    """Builds DS-CNN as an adder network (kind='adder') or as a CNN (kind='cnn').

    22,218 parameters; 5.23 M multiply-accumulates on a 32x32 image, 4.78 M of them in the 8 layers of `kind`.

    >>> sum(p.numel() for p in ds_cnn().parameters())
    22218
    """
    return DSCNN(kind, in_channels, num_classes)


@register_model(image_size=32)
def ds_cnn_x0_5(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> DSCNN:
    """Builds DS-CNN of half the width: 32 channels; 1.56 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in ds_cnn_x0_5().parameters())
    7018
    """
    return DSCNN(kind, in_channels, num_classes, width=0.5)


@register_model(image_size=32)
def ds_cnn_x1_5(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> DSCNN:
    """Builds DS-CNN of 1.5 times the width: 96 channels; 10.99 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in ds_cnn_x1_5().parameters())
    45610
    """
    return DSCNN(kind, in_channels, num_classes, width=1.5)


@register_model(image_size=32)
def ds_cnn_x2_0(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> DSCNN:
    """Builds DS-CNN of twice the width: 128 channels; 18.84 M multiply-accumulates on a 32x32 image.

    >>> sum(p.numel() for p in ds_cnn_x2_0().parameters())
    77194
    """
    return DSCNN(kind, in_channels, num_classes, width=2.0)
