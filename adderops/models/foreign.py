"""Networks of torchvision and timm, unchanged or with adder layers."""

import difflib
import importlib
import warnings
from types import ModuleType

from torch import nn

from adderops.models.intermediates import matched_layers
from adderops.models.kinds import layer_of_kind
from adderops.nn import AdderConv2d, convert

# in training these two return more than logits by default
_TORCHVISION_OPTIONS = dict.fromkeys(("googlenet", "inception_v3"), {"aux_logits": False, "init_weights": True})


def create_foreign_model(arch: str, kind: str, in_channels: int, num_classes: int) -> nn.Module:
    """Builds 'torchvision/NAME' or 'timm/NAME', untrained; kind='adder' applies `adderops.convert`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: unknown name or kind; in_channels other than 3 for torchvision; kind='adder' for a network in which
            no convolution can become an adder layer.

    Warns:
        UserWarning: with kind='adder', if matched layers stay ordinary convolutions.
    """
    layer_of_kind(kind)
    model = _BUILDERS[arch.partition("/")[0]](arch, in_channels, num_classes)
    if kind == "adder":
        convert(model, verbose=False)
        matched = matched_layers(model)
        ordinary = [name for name, layer in matched.items() if not isinstance(layer, AdderConv2d)]
        if len(ordinary) == len(matched):
            raise ValueError(f"arch: expected a network of plain convolutions followed by normalisation, got {arch!r}")
        if ordinary:
            named = ", ".join(ordinary[:3]) + (", ..." if len(ordinary) > 3 else "")
            warnings.warn(
                f"{arch}: {len(ordinary)} of {len(matched)} convolutions stay ordinary, because no normalisation "
                f"follows them or they have a custom forward (`adderops.convert` says which): {named}",
                stacklevel=3,
            )
    return model


def _torchvision(arch: str, in_channels: int, num_classes: int) -> nn.Module:
    models = _import("torchvision", arch).models
    name = _known_name(arch, models.list_models(module=models))
    if in_channels != 3:
        raise ValueError(f"in_channels: expected 3 for {arch!r}, got {in_channels}: torchvision's networks take RGB")
    return models.get_model(name, weights=None, num_classes=num_classes, **_TORCHVISION_OPTIONS.get(name, {}))


def _timm(arch: str, in_channels: int, num_classes: int) -> nn.Module:
    timm = _import("timm", arch)
    # also with the tag of pretrained weights: resnet18.a1_in1k
    name = _known_name(arch, timm.list_models() + timm.list_pretrained())
    return timm.create_model(name, pretrained=False, in_chans=in_channels, num_classes=num_classes)


_BUILDERS = {"torchvision": _torchvision, "timm": _timm}
LIBRARIES = tuple(_BUILDERS)


def _import(library: str, arch: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as missing:
        if missing.name != library:
            raise
        raise ModuleNotFoundError(f"arch {arch!r} needs {library}: pip install {library}", name=library) from None


def _known_name(arch: str, names: list[str]) -> str:
    library, _, name = arch.partition("/")
    if name not in names:
        close = ", ".join(f"'{library}/{n}'" for n in difflib.get_close_matches(name, names, n=5, cutoff=0))
        raise ValueError(f"arch: expected one of {len(names)} networks of {library}, such as {close}, got {arch!r}")
    return name
