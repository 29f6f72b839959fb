"""Networks, each defined once and built as adder network or as CNN: the student and the teacher of PKKD.

They are plain modules: `network(x)` gives logits.  `IntermediateOutputs` gets the raw outputs of the layers between the
first convolution and the classifier out of any of them, and out of networks of torchvision and timm.
"""

from torch import nn

from adderops.models.checkpoints import load_reference_checkpoint, mark_adder_weights, unwrap_state_dict
from adderops.models.foreign import LIBRARIES, create_foreign_model
from adderops.models.intermediates import IntermediateOutputs, classifier, matched_layers
from adderops.models.lenet import LeNet5BN, lenet5
from adderops.models.mobilenet import MobileNet, mobilenet
from adderops.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNetCIFAR,
    ResNetImageNet,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
)
from adderops.models.vgg import VGGSmall, vgg_small

ARCHITECTURES = {
    "lenet5": lenet5,
    "vgg_small": vgg_small,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "mobilenet": mobilenet,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
_OF_IMAGENET = ("resnet18", "resnet50")

__all__ = [
    "ARCHITECTURES",
    "BasicBlock",
    "Bottleneck",
    "IntermediateOutputs",
    "LeNet5BN",
    "MobileNet",
    "ResNetCIFAR",
    "ResNetImageNet",
    "VGGSmall",
    "classifier",
    "create_model",
    "input_size",
    "lenet5",
    "load_reference_checkpoint",
    "mark_adder_weights",
    "matched_layers",
    "mobilenet",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "unwrap_state_dict",
    "vgg_small",
]


def create_model(arch: str, kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """Builds a network by name, untrained.

    Args:
        arch: one of `ARCHITECTURES`; or 'torchvision/NAME' or 'timm/NAME' where that package is installed.
            kind='adder' puts such a network through `adderops.convert`.  A tag of timm's (resnet18.a1_in1k) is allowed.
        kind: 'adder' or 'cnn'.
        in_channels: of the images.
        num_classes: number of logits.

    Raises:
        ValueError: unknown arch or kind; in_channels other than 3 for torchvision; kind='adder' for a network of which
            no convolution can become an adder layer.
        ModuleNotFoundError: the package that `arch` names is not installed.

    Warns:
        UserWarning: not all convolutions between the first and the classifier became adder layers.

    >>> len(matched_layers(create_model("resnet20")))
    20
    """
    if _library(arch):
        return create_foreign_model(arch, kind, in_channels, num_classes)
    return ARCHITECTURES[arch](kind, in_channels, num_classes)


def input_size(arch: str) -> int:
    """Returns height and width of the images that an architecture is made for.

    224 for ResNet-18, ResNet-50 and the networks of torchvision and timm, of which some have another; else 32.

    Raises:
        ValueError: unknown arch.

    >>> input_size("lenet5"), input_size("resnet50")
    (32, 224)
    """
    return 224 if _library(arch) or arch in _OF_IMAGENET else 32


def _library(arch: str) -> str | None:
    """'torchvision' or 'timm' where `arch` names a network of theirs, None where it names one of ours."""
    library = arch.partition("/")[0]
    if arch not in ARCHITECTURES and (library == arch or library not in LIBRARIES):
        choices = [*map(repr, ARCHITECTURES), *(f"'{known}/NAME'" for known in LIBRARIES)]
        raise ValueError(f"arch: expected one of {', '.join(choices)}, got {arch!r}")
    return None if arch in ARCHITECTURES else library
