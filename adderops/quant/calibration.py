"""Calibration: makes the layers of a trained network fake-quantized, on grids that fit their inputs."""

import warnings
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from adderops.nn import AdderConv2d
from adderops.quant.fake_quantized import FLOAT_BITS, QuantAdderConv2d, QuantConv2d, Quantized, QuantLinear
from adderops.quant.scheme import Scheme


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Returns the fake-quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def insert(model: nn.Module, scheme: Scheme | None = None) -> nn.Module:
    """Turns every `AdderConv2d` of a model into a `QuantAdderConv2d`, in place and not yet calibrated.

    With `scheme.ends == 'int8'` every `nn.Conv2d` and `nn.Linear` becomes fake-quantized too. Use this to load the
    state_dict of a calibrated model; otherwise call `calibrate`.

    Args:
        model: with `AdderConv2d`.
        scheme: bits and method; `Scheme()` if None.

    Returns:
        The model, without the wrappers of torch.compile and DataParallel.

    Raises:
        ValueError: the model has no `AdderConv2d`, a subclass of it, a layer whose weight is computed (by pruning, for
            example), a BatchNorm without running statistics, or fake-quantized layers already. The model is then
            unchanged.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = calibrate(reestimate_batchnorm(lenet5(), [images]), [images])
    >>> restored = insert(lenet5())
    >>> restored.load_state_dict(model.state_dict())
    <All keys matched successfully>
    """
    scheme = scheme or Scheme()
    model = unwrapped(model)
    used: list[type[Quantized]] = [QuantAdderConv2d]
    if scheme.ends == "int8":
        used += [QuantConv2d, QuantLinear]
    kinds = {kind.plain_kind: kind for kind in used}
    if quantized_layers(model):
        raise ValueError("model: expected a floating-point network, got one that is quantized already")
    adders = {name: module for name, module in model.named_modules() if isinstance(module, AdderConv2d)}
    if not adders:
        raise ValueError("model: expected a network with AdderConv2d, got one without")
    for name, adder in adders.items():
        if type(adder) is not AdderConv2d:
            raise ValueError(
                f"model: {name}: expected AdderConv2d itself, got {type(adder).__name__}, which may compute something "
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
        kind = kinds.get(type(module))
        if kind is not None:
            kind.take_over(module, scheme)
    return model


_Batches = Iterable[Tensor | tuple[Any, ...] | list[Any]]


def calibrate(model: nn.Module, batches: _Batches, scheme: Scheme | None = None) -> nn.Module:
    """Makes the adder layers of a trained model fake-quantized, on grids that fit their inputs, in place.

    The layers become `QuantAdderConv2d`, which compute in floating point what the integer network will. The result is
    an ordinary model: test it, re-estimate its BatchNorm (`adderops.reestimate_batchnorm`), fine-tune it with
    straight-through gradients, or convert it to integers (`adderops.quant.convert`).

    Args:
        model: with `AdderConv2d`. The batches run in evaluation mode; the mode of the model is kept.
        batches: inputs of the model, preprocessed as in testing, or tuples whose first element is the input, as a
            DataLoader of (images, labels) returns them. They are moved to the device of the model. A few hundred
            images of the training set are enough.
        scheme: bits and method; `Scheme()`, 8 bits by redistribution, if None.

    Returns:
        The model, without the wrappers of torch.compile and DataParallel. Layers that no batch reaches, such as
        auxiliary heads that run in training only, are not quantized. A layer whose inputs are all 0 takes its grid from
        its weights. A warning names the layers in both cases.

    Raises:
        TypeError: batches of another type.
        ValueError: no batch, a batch with NaN or infinity, only zeros in all layers; and as `insert`.
        Any error, also one raised by the model, leaves the model unchanged.

    Warns:
        UserWarning: layers that no batch reaches, or that only zeros reach.

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


def calibrate_ends(model: nn.Module, batches: _Batches) -> nn.Module:
    """Makes the ends of a calibrated model fake-quantized as well, as `Scheme(ends='int8')` does, in place.

    For a model that was fine-tuned with its ends in floating point; its adder layers stay as they are.

    Args:
        model: what `calibrate` returned, or a fine-tuned one.
        batches: as in `calibrate`.

    Returns:
        The model, without the wrappers of torch.compile and DataParallel.

    Raises:
        ValueError: the model is not calibrated, or its ends are fake-quantized already; and as `calibrate`.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = calibrate(reestimate_batchnorm(lenet5(), [images]), [images])
    >>> list(quantized_layers(calibrate_ends(model, [images])))
    ['conv1', 'conv2', 'conv3', 'conv4', 'fc']
    """
    model = unwrapped(model)
    adders = quantized_layers(model).values()
    schemes = [layer.scheme for layer in adders]
    if not schemes or schemes[0].ends != "float":
        got = "none of its layers" if not schemes else "one with its ends"
        raise ValueError(f"model: expected a calibrated one with its ends in floating point, got {got}")
    scheme = replace(schemes[0], ends="int8")
    kinds: dict[type[nn.Module], type[Quantized]] = {kind.plain_kind: kind for kind in (QuantConv2d, QuantLinear)}
    ends = {name: module for name, module in model.named_modules() if type(module) in kinds}
    for module in ends.values():
        kinds[type(module)].take_over(module, scheme)
    try:
        observe(model, batches, ends)
    except BaseException:
        for module in ends.values():
            assert isinstance(module, Quantized)
            module.give_back()
        raise
    for layer in adders:
        layer.scheme = scheme
    return model


@torch.no_grad()
def observe(model: nn.Module, batches: _Batches, names: Container[str] | None = None) -> nn.Module:
    """Calibrates the layers of `insert`: observes their inputs, which determine the grids.

    Arguments, result, errors and warnings as `calibrate`, which is `insert` and `observe`. With `names`, only these
    layers; the others compute on their grids.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = observe(insert(reestimate_batchnorm(lenet5(), [images])), [images])
    >>> model.conv2.calibrated
    True
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches: expected an iterable of batches, got one tensor")
    model = unwrapped(model)
    layers = {name: layer for name, layer in quantized_layers(model).items() if names is None or name in names}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0

    def observing(name: str, layer: Quantized) -> Callable[[Tensor], Tensor]:
        """Returns the unquantized forward of a layer that also records the range of its inputs."""

        def forward(input: Tensor) -> Tensor:
            if input.numel() > 0:
                found = layer.range_of(input)
                if not (found[0].isfinite() and found[1].isfinite() and input.isfinite().all()):
                    raise ValueError(
                        f"batches: expected finite inputs of {name!r}, got NaN or infinity in batch {count}"
                    )
                low, high = ranges.get(name, found)
                ranges[name] = torch.minimum(low, found[0]), torch.maximum(high, found[1])
            output: Tensor = layer.plain_kind.forward(layer, input)
            return output

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
        raise ValueError(f"batches: expected inputs that reach layer {dead[0]!r}, got only zeros there")
    for name in dead:  # 0 is on every grid; this one also suits other inputs
        largest = layers[name].weight.abs().amax().float()
        ranges[name] = torch.zeros_like(largest), largest if largest > 0 else torch.ones_like(largest)
    for name, (low, high) in ranges.items():
        layers[name].input_low.copy_(low)
        layers[name].input_high.copy_(high)
    for name in unreached:
        layers[name].bits.fill_(FLOAT_BITS)
    for names, what in (
        (unreached, "no batch reaches {} in evaluation mode: such layers are not quantized"),
        (
            dead,
            "only zeros reach {}: the grid fits the weights instead (are BatchNorm statistics up to date?)",
        ),
    ):
        if names:
            warnings.warn(f"calibrate: {what.format(', '.join(map(repr, names)))}", stacklevel=3)
    return model
