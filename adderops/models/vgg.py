"""VGG-small, the VGG of the literature on binary networks and of AdderNet's CIFAR experiments (arXiv 1912.13200)."""

import torch.nn.functional as F
from torch import Tensor, fx, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model
from adderops.models.sizes import require_image_size

fx.wrap("require_image_size")


class VGGSmall(nn.Module):
    """VGG-small for 32x32 images: six 3x3 layers of 128, 128, 256, 256, 512, 512 channels, and a linear classifier.

    BatchNorm and ReLU after each of the six, 2x2 max pooling after the second, fourth and sixth. The first layer is an
    ordinary convolution in both kinds, the other five are of `kind`. They have no bias: BatchNorm follows.

    Args:
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        ValueError: another kind, or in `forward` images of another size.

    >>> VGGSmall("cnn")(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        self.conv1 = nn.Conv2d(in_channels, 128, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.conv2 = layer(128, 128, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(128)
        self.conv3 = layer(128, 256, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(256)
        self.conv4 = layer(256, 256, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(256)
        self.conv5 = layer(256, 512, 3, padding=1, bias=False)
        self.bn5 = nn.BatchNorm2d(512)
        self.conv6 = layer(512, 512, 3, padding=1, bias=False)
        self.bn6 = nn.BatchNorm2d(512)
        self.fc = nn.Linear(512 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        x = require_image_size("VGGSmall", x, 32)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.max_pool2d(F.relu(self.bn4(self.conv4(x))), 2)
        x = F.relu(self.bn5(self.conv5(x)))
        x = F.max_pool2d(F.relu(self.bn6(self.conv6(x))), 2)
        return self.fc(x.flatten(1))


@register_model(image_size=32)
def vgg_small(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> VGGSmall:
    """Builds VGG-small as an adder network (kind='adder') or as a CNN (kind='cnn').

    4,660,106 parameters; 607.6 M multiply-accumulates on a 32x32 image, 604.0 M of them in the 5 layers of `kind`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in vgg_small().parameters())
    4660106
    """
    return VGGSmall(kind, in_channels, num_classes)
