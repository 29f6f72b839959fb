"""A multilayer perceptron, the network of desire backpropagation (arXiv 2211.05412)."""

import torch.nn.functional as F
from torch import Tensor, fx, nn

from adderops.models.kinds import layer_of_kind
from adderops.models.registry import register_model
from adderops.models.sizes import require_image_size

fx.wrap("require_image_size")
FRAME = 2  # pixels on each side of a 32x32 image: the padding of MNIST and Fashion-MNIST


class MLP(nn.Module):
    """Fully connected layers on the middle 28x28 pixels of 32x32 images, without biases; ReLU after each but the last.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        hidden: neurons of the hidden layers.
        dropout: shares of inputs and of hidden neurons that are dropped in training.

    Raises:
        ValueError: in `forward` images of another size.

    >>> MLP(hidden=(50, 20))(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        hidden: tuple[int, int] = (1000, 100),
        dropout: tuple[float, float] = (0.05, 0.4),
    ) -> None:
        super().__init__()
        side = 32 - 2 * FRAME
        self.in_channels = in_channels
        self.fc1 = nn.Linear(in_channels * side * side, hidden[0], bias=False)
        self.fc2 = nn.Linear(*hidden, bias=False)
        self.fc = nn.Linear(hidden[1], num_classes, bias=False)
        self.dropped = (dropout[0], dropout[1], dropout[1])
        self.dropout = nn.ModuleList(map(nn.Dropout, self.dropped))
        for layer in (self.fc1, self.fc2, self.fc):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    @staticmethod
    def pixels(x: Tensor) -> Tensor:
        """Returns the inputs of the first layer, (N, in_channels * 784)."""
        return require_image_size("MLP", x, 32)[..., FRAME:-FRAME, FRAME:-FRAME].flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of images (N, in_channels, 32, 32)."""
        x = self.dropout[0](self.pixels(x))
        x = self.dropout[1](F.relu(self.fc1(x)))
        x = self.dropout[2](F.relu(self.fc2(x)))
        return self.fc(x)


@register_model(image_size=32)
def mlp(kind: str = "cnn", in_channels: int = 1, num_classes: int = 10) -> MLP:
    """Builds the network for Fashion-MNIST, 784-1000-100-10, of kind 'cnn' only: an adder layer needs BatchNorm.

    885,000 parameters and as many multiply-accumulates with one input channel.

    Raises:
        ValueError: another kind.

    >>> mlp()(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """
    layer_of_kind(kind)
    if kind != "cnn":
        raise ValueError(f"kind: expected 'cnn' for mlp, which has no BatchNorm, got {kind!r}")
    return MLP(in_channels, num_classes)
