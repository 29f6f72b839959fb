"""The registry of networks: `register_model` adds one, `create_model` builds one by name."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import nn

from adderops.models.foreign import LIBRARIES, create_foreign_model


class Builder(Protocol):
    """A function that builds an untrained network; its name and its further parameters are free."""

    @property
    def __name__(self) -> str: ...

    def __call__(self, kind: str, in_channels: int, num_classes: int) -> nn.Module: ...


@dataclass(frozen=True)
class Architecture:
    """A registered network; calling it builds the network.

    Attributes:
        build: the registered function.
        image_size: default height and width of its images, in pixels.

    >>> ARCHITECTURES["lenet5"].image_size
    32
    """

    build: Builder
    image_size: int

    def __call__(self, kind: str = "adder", *args: int, **kwargs: int) -> nn.Module:
        """Builds the network; further arguments are those of `build`."""
        return self.build(kind, *args, **kwargs)


ARCHITECTURES: dict[str, Architecture] = {}
"""All registered networks by name, in the order of their registration."""

_Builder = TypeVar("_Builder", bound=Builder)


def register_model(name: str | None = None, *, image_size: int) -> Callable[[_Builder], _Builder]:
    """Registers a network under a name: a decorator for the function that builds it.

    The name then works wherever the built-in names do: `create_model`, `adderops.distill` and its `--arch`. Import the
    module that registers a network before the name is used. `layer_of_kind` returns the layer class of a kind.

    Args:
        name: letters, digits, '_', '-' and '.'; the name of the function by default.
        image_size: default height and width of the images, in pixels.

    Returns:
        A decorator that returns the function unchanged. The function takes `kind` ('adder' or 'cnn'), `in_channels`
        and `num_classes`, in this order and also by keyword, and returns a module that maps images
        (N, in_channels, image_size, image_size) to logits (N, num_classes).

    Raises:
        ValueError: a malformed name, one that another function has registered, or an image_size below 1.

    >>> from adderops.models import layer_of_kind
    >>> @register_model(image_size=8)
    ... def tiny(kind="adder", in_channels=3, num_classes=10):
    ...     return nn.Sequential(
    ...         *(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    ...         *(layer_of_kind(kind)(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    ...         *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    ...     )
    >>> type(create_model("tiny", "adder")[3]).__name__, input_size("tiny")
    ('AdderConv2d', 8)
    >>> _ = ARCHITECTURES.pop("tiny")
    """
    if image_size < 1:
        raise ValueError(f"register_model: image_size: expected at least 1, got {image_size}")

    def register(build: _Builder) -> _Builder:
        known_as = build.__name__ if name is None else name
        if not re.fullmatch(r"[\w.-]+", known_as):
            raise ValueError(f"register_model: name: expected letters, digits, '_', '-' and '.', got {known_as!r}")
        known = ARCHITECTURES.get(known_as)
        if known is not None and _origin(known.build) != _origin(build):
            raise ValueError(f"register_model: name: expected a new one, got {known_as!r} of {_origin(known.build)}")
        ARCHITECTURES[known_as] = Architecture(build, image_size)
        return build

    return register


def _origin(build: Builder) -> str:
    """Module and name: equal for one function whose module or notebook cell is run again."""
    return f"{build.__module__}.{build.__name__}"


def create_model(arch: str, kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """Builds a network by name, untrained.

    Args:
        arch: one of `ARCHITECTURES`; or 'torchvision/NAME' or 'timm/NAME' if that package is installed, with
            `adderops.convert` applied for kind='adder'. Names of timm may have a tag (resnet18.a1_in1k).
        kind: 'adder' or 'cnn'.
        in_channels: channels of the images.
        num_classes: number of logits.

    Returns:
        The network, in training mode: images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: unknown arch or kind; in_channels other than 3 for torchvision; kind='adder' for a network in which
            no convolution can become an adder layer.
        ModuleNotFoundError: the package that `arch` names is not installed.

    Warns:
        UserWarning: some convolutions between the first layer and the classifier stay ordinary.

    >>> from adderops.models import matched_layers
    >>> len(matched_layers(create_model("resnet20")))
    20
    """
    if _library(arch):
        return create_foreign_model(arch, kind, in_channels, num_classes)
    return ARCHITECTURES[arch](kind, in_channels, num_classes)


def input_size(arch: str) -> int:
    """Returns the default height and width, in pixels, of the images for an architecture.

    It is the registered `image_size`, and 224 for all networks of torchvision and timm, a few of which differ.

    Raises:
        ValueError: unknown arch.

    >>> input_size("lenet5"), input_size("resnet50")
    (32, 224)
    """
    return 224 if _library(arch) else ARCHITECTURES[arch].image_size


def _library(arch: str) -> str | None:
    """'torchvision' or 'timm' if `arch` names a network of theirs, None if it is a registered one."""
    library = arch.partition("/")[0]
    if arch not in ARCHITECTURES and (library == arch or library not in LIBRARIES):
        choices = [*map(repr, ARCHITECTURES), *(f"'{known}/NAME'" for known in LIBRARIES)]
        raise ValueError(f"arch: expected one of {', '.join(choices)}, got {arch!r}")
    return None if arch in ARCHITECTURES else library
