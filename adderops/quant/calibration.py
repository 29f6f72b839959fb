"""From a trained network to one whose layers know their grids."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from adderops.nn import AdderConv2d
from adderops.quant.fake_quantized import FLOAT_BITS, QuantAdderConv2d, QuantConv2d, Quantized, QuantLinear
from adderops.quant.scheme import Scheme


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Returns the layers that `calibrate` put into a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without what torch.compile, DataParallel and DistributedDataParallel put round it."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def insert(model: nn.Module, scheme: Scheme | None = None) -> nn.Module:
    """Makes every `AdderConv2d` of a model a `QuantAdderConv2d`, the same object otherwise; not yet calibrated.

    With `scheme.ends == 'int8'` every `nn.Conv2d` and `nn.Linear` becomes a layer of that kind too.  For loading the
    state_dict of a calibrated model; otherwise call `calibrate`.

    Returns:
        The model, without the wrappers of torch.compile and DataParallel.

    Raises:
        ValueError: the model has no `AdderConv2d`, one of a subclass or with a weight that is computed (pruned, say), a
            BatchNorm without running statistics, or has been through this before.  It is then as it was.
    """
    scheme = scheme or Scheme()
    model = unwrapped(model)
    used = [QuantAdderConv2d] + [QuantConv2d, QuantLinear] * (scheme.ends == "int8")
    kinds = {kind.plain_kind: kind for kind in used}
    if quantized_layers(model):
        raise ValueError("model: expected a network of floats, got one that is quantized already")
    adders = {name: module for name, module in model.named_modules() if isinstance(module, AdderConv2d)}
    if not adders:
        raise ValueError("model: expected a network with AdderConv2d, got one without")
    for name, module in adders.items():
        if type(module) is not AdderConv2d:
            raise ValueError(
                f"model: {name}: expected AdderConv2d itself, got {type(module).__name__}, which may compute something "
                "else (of a parametrization: torch.nn.utils.parametrize.remove_parametrizations)"
            )
    for name, module in model.named_modules():
        if type(module) in kinds and "forward" in vars(module):
            raise ValueError(f"model: {name}: expected its class's forward, got another one set on the module")
        if type(module) in kinds and "weight" not in module._parameters:
            raise ValueError(
                f"model: {name}: expected a weight that is a parameter, got one that is computed "
                "(of pruning: torch.nn.utils.prune.remove makes it one)"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model: {name}: expected a BatchNorm with running statistics, got one without, whose result depends "
                "on the rest of the batch"
            )
    for module in list(model.modules()):
        if type(module) in kinds:
            kinds[type(module)].take_over(module, scheme)
    return model


def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple | list], scheme: Scheme | None = None) -> nn.Module:
    """Quantizes the adder layers of a trained model to grids that fit the inputs they get, in place.

    The layers become `QuantAdderConv2d`, which compute in floats what the integers will give.  Test the result like any
    model, re-estimate its BatchNorm (`adderops.reestimate_batchnorm`), train it further (its gradients go straight
    through the rounding), or make it integer by `adderops.quant.convert`.

    Args:
        model: with `AdderConv2d`; its mode is kept, the batches go through in evaluation mode.
        batches: inputs of the model, as in testing, or tuples whose first element is the input, as a DataLoader of
            (images, labels) gives them; they go to the model's device.  A few hundred images of the training set do.
        scheme: bits and method; 8 bits by redistribution if None.

    Returns:
        The model, without the wrappers of torch.compile and DataParallel.  Layers that no batch reaches, those of
        auxiliary heads that run in training only, stay in floats; a layer that gets nothing but zeros takes its grid
        from its weights.  Warnings name both.

    Raises:
        TypeError: batches of something else.
        ValueError: no batch, one with NaN or infinity, or nothing but zeros in all layers; and as `insert`.
        Whatever is raised, also by the model, leaves it as it was.

    >>> from adderops import reestimate_batchnorm
    >>> from adderops.models import lenet5
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images])  # stands for training
    >>> model = calibrate(model.eval(), [images])
    >>> model.conv2.input_grid().zero_point, model.conv2.input_grid().quant_max
    (0, 255)
    """
    model = insert(model, scheme)
    try:
        return observe(model, batches)
    except BaseException:
        for layer in quantized_layers(model).values():
            layer.give_back()
        raise


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Tensor | tuple | list]) -> nn.Module:
    """Gives the layers of `insert` their grids; see `calibrate`."""
    if isinstance(batches, Tensor):
        raise TypeError("batches: expected an iterable of batches, got one tensor")
    model = unwrapped(model)
    layers = quantized_layers(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0

    def observing(name: str, layer: Quantized):
        """The layer's forward in floats, which notes the range of its inputs."""

        def forward(input: Tensor) -> Tensor:
            if input.numel() > 0:
                found = layer.range_of(input)
                if not (found[0].isfinite() and found[1].isfinite() and input.isfinite().all()):
                    raise ValueError(
                        f"batches: expected finite inputs of {name!r}, got NaN or infinity in batch {count}"
                    )
                low, high = ranges.get(name, found)
                ranges[name] = torch.minimum(low, found[0]), torch.maximum(high, found[1])
            return layer.plain_kind.forward(layer, input)

        return forward

    modes = [(module, module.training) for module in model.modules()]
    device = next((tensor.device for tensor in model.parameters()), None)
    try:
        for name, layer in layers.items():
            layer.forward = observing(name, layer)
        model.eval()
        with torch.compiler.set_stance("force_eager"):
            for batch in batches:
                images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(images, Tensor):
                    raise TypeError(f"batches: expected tensors or (images, labels), got {type(batch).__name__}")
                count += 1
                if images.is_floating_point() and not images.isfinite().all():
                    image = 1 + int(images.isfinite().logical_not().nonzero()[0, 0])
                    raise ValueError(
                        f"batches: expected finite images, got NaN or infinity in image {image} of batch {count}"
                    )
                model(images.to(device))
    finally:
        for module, mode in modes:
            module.training = mode
        for layer in layers.values():
            vars(layer).pop("forward", None)
    if count == 0:
        raise ValueError("batches: expected at least one, got none")
    unreached = [name for name in layers if name not in ranges]
    if len(unreached) == len(layers):
        raise ValueError(f"batches: expected inputs that reach a layer of {', '.join(map(repr, layers))}, got none")
    dead = [name for name, (low, high) in ranges.items() if low == high]
    if len(dead) == len(ranges):
        raise ValueError(f"batches: expected inputs that reach layer {dead[0]!r}, got none but zeros there")
    for name in dead:  # whatever the grid, zeros are on it; this one suits others too
        largest = layers[name].weight.abs().amax().float()
        ranges[name] = torch.zeros_like(largest), largest if largest > 0 else torch.ones_like(largest)
    for name, (low, high) in ranges.items():
        layers[name].input_low.copy_(low)
        layers[name].input_high.copy_(high)
    for name in unreached:
        layers[name].bits.fill_(FLOAT_BITS)
    for names, what in (
        (unreached, "no batch reaches {} in evaluation: what is not reached stays in floats"),
        (
            dead,
            "nothing but zeros reaches {}: such a grid fits the weights (are BatchNorm statistics up to date?)",
        ),
    ):
        if names:
            warnings.warn(f"calibrate: {what.format(', '.join(map(repr, names)))}", stacklevel=3)
    return model
