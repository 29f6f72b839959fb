"""LeNet-5 with BatchNorm, the network of AdderNet's MNIST experiment (arXiv 1912.13200, section 4.1)."""

import torch.nn.functional as F
from torch import Tensor, fx, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model
from adderops.models.sizes import require_image_size

fx.wrap("require_image_size")


class LeNet5BN(nn.Module):
    """LeNet-5-BN for 32x32 images, with its fully connected layers as convolutions.

    conv 5x5 -> 6, layer 5x5 -> 16, layer 5x5 -> 120, layer 1x1 -> 84, linear -> num_classes; BatchNorm and ReLU after
    each but the last, 2x2 max pooling after the first two. `layer` is an adder layer or a convolution, by `kind`; the
    first convolution and the classifier are ordinary in both kinds. Only the classifier has a bias: BatchNorm follows
    the others.

    Args:
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.

    Raises:
        ValueError: another kind, or in `forward` images of another size.

    >>> LeNet5BN("adder")(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, kind: str = "adder", in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        self.conv1 = nn.Conv2d(in_channels, 6, 5, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = layer(6, 16, 5, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = layer(16, 120, 5, bias=False)
        self.bn3 = nn.BatchNorm2d(120)
        self.conv4 = layer(120, 84, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(84)
        self.fc = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        x = require_image_size("LeNet5BN", x, 32)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.flatten(1))


@register_model(image_size=32)
def lenet5(kind: str = "adder", in_channels: int = 1, num_classes: int = 10) -> LeNet5BN:
    """Builds LeNet-5-BN as an adder network (kind='adder') or as a CNN (kind='cnn').

    61,932 parameters with one input channel; 416,520 multiply-accumulates, 298,080 of them in the 3 layers of `kind`.

    >>> lenet5(kind="cnn")(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """
    return LeNet5BN(kind, in_channels, num_classes)
