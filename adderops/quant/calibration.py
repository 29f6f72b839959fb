"""From a trained network to one whose layers know their grids."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adderops.nn import AdderConv2d
from adderops.quant.layers import QuantAdderConv2d, QuantConv2d, Quantized, QuantLinear
from adderops.quant.scheme import Scheme


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Returns the layers that `calibrate` put into a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def insert(model: nn.Module, scheme: Scheme | None = None) -> nn.Module:
    """Makes every `AdderConv2d` of a model a `QuantAdderConv2d`, the same object otherwise; not yet calibrated.

    With `scheme.ends == 'int8'` every `nn.Conv2d` and `nn.Linear` becomes a layer of that kind too.  For loading the
    state_dict of a calibrated model; otherwise call `calibrate`.

    Raises:
        ValueError: the model has no `AdderConv2d`, or has been through this before.
    """
    scheme = scheme or Scheme()
    used = [QuantAdderConv2d] + [QuantConv2d, QuantLinear] * (scheme.ends == "int8")
    kinds = {kind.plain_kind: kind for kind in used}
    if quantized_layers(model):
        raise ValueError("model: expected a network of floats, got one that is quantized already")
    if not any(type(module) is AdderConv2d for module in model.modules()):
        raise ValueError("model: expected a network with AdderConv2d, got one without")
    for module in list(model.modules()):
        if type(module) in kinds:
            kinds[type(module)].take_over(module, scheme)
    return model


def calibrate(model: nn.Module, batches: Iterable[Tensor], scheme: Scheme | None = None) -> nn.Module:
    """Quantizes the adder layers of a trained model to grids that fit the inputs they get, in place.

    The layers become `QuantAdderConv2d`, which compute in floats what the integers will give.  Test the result like any
    model, re-estimate its BatchNorm (`adderops.reestimate_batchnorm`), train it further (its gradients go straight
    through the rounding), or make it integer by `adderops.quant.convert`.

    Args:
        model: with `AdderConv2d`; its mode is kept, the batches go through in evaluation mode.
        batches: inputs of the model, as in testing; a few hundred images of the training set do.
        scheme: bits and method; 8 bits by redistribution if None.

    Returns:
        The model.

    Raises:
        ValueError: no batch, no adder layer, or a layer that got nothing but zeros.

    >>> from adderops import reestimate_batchnorm
    >>> from adderops.models import lenet5
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images])  # stands for training
    >>> model = calibrate(model.eval(), [images])
    >>> model.conv2.input_grid().zero_point, model.conv2.input_grid().quant_max
    (0, 255)
    """
    return observe(insert(model, scheme), batches)


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Gives the layers of `insert` their grids; see `calibrate`."""
    layers = quantized_layers(model)
    modes = [(module, module.training) for module in model.modules()]
    originals = {layer: layer.forward for layer in layers.values()}
    seen = 0
    try:
        for layer in layers.values():
            layer.forward = _observing(layer)
        model.eval()
        for batch in batches:
            model(batch)
            seen += 1
    finally:
        for module, mode in modes:
            module.training = mode
        for layer in originals:
            del layer.forward
    if seen == 0:
        raise ValueError("batches: expected at least one, got none")
    for name, layer in layers.items():
        if not layer.calibrated:
            raise ValueError(f"batches: expected inputs that reach layer {name!r}, got none but zeros there")
    return model


def _observing(layer: Quantized):
    """The layer's forward in floats, which notes the range of its inputs."""

    def forward(input: Tensor) -> Tensor:
        layer.observe(input)
        return layer.plain_kind.forward(layer, input)

    return forward
