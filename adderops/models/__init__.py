"""Networks, each defined once and built as adder network or as CNN: the student and the teacher of PKKD.

`network(x)` gives logits; `network(x, intermediates=True)` gives also the raw outputs of `network.matched_layers()`,
those before BatchNorm of all layers but the first convolution and the classifier.  No hooks are involved.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from adderops.models.lenet import LeNet5BN, lenet5
from adderops.models.resnet import BasicBlock, ResNetCIFAR, resnet20

ARCHITECTURES = {"lenet5": lenet5, "resnet20": resnet20}

__all__ = [
    "ARCHITECTURES",
    "BasicBlock",
    "LeNet5BN",
    "ResNetCIFAR",
    "create_model",
    "lenet5",
    "load_reference_checkpoint",
    "resnet20",
]


def create_model(arch: str, kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """Builds a network by name.

    Args:
        arch: 'lenet5' or 'resnet20'.
        kind: 'adder' or 'cnn'.
        in_channels: of the images.
        num_classes: number of logits.

    Raises:
        ValueError: unknown arch or kind.

    >>> len(create_model("resnet20").matched_layers())
    20
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(map(repr, ARCHITECTURES))}, got {arch!r}")
    return ARCHITECTURES[arch](kind, in_channels, num_classes)


def load_reference_checkpoint(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a checkpoint of the AdderNet reference code strictly into `model`.

    Takes the prefix `module.` off the keys; the adder layers take the key `adder` for their `weight` by themselves.

    Args:
        model: an adder network of the same architecture, `resnet20()` for example.
        state_dict: flat, as the reference code publishes it; it is not changed.

    Raises:
        RuntimeError: missing, unexpected or misshapen entries.

    >>> student, published = resnet20(), resnet20().state_dict()
    >>> published = {f"module.{k}": v for k, v in published.items()}
    >>> load_reference_checkpoint(student, published)
    """
    state = dict(state_dict)
    consume_prefix_in_state_dict_if_present(state, "module.")
    model.load_state_dict(state)
