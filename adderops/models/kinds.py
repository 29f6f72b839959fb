"""The kinds of networks: the one place that maps 'adder' and 'cnn' to a layer class."""

from torch import nn

from adderops.nn import AdderConv2d

_LAYERS = {"adder": AdderConv2d, "cnn": nn.Conv2d}


def layer_of_kind(kind: str) -> type[nn.Module]:
    """Returns AdderConv2d for 'adder' and torch.nn.Conv2d for 'cnn': both have the same constructor.

    Raises:
        ValueError: any other kind.

    >>> layer_of_kind("adder")(16, 32, kernel_size=3, bias=False).weight.shape
    torch.Size([32, 16, 3, 3])
    """
    if kind not in _LAYERS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, _LAYERS))}, got {kind!r}")
    return _LAYERS[kind]
