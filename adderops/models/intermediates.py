"""The layers that PKKD matches between teacher and student, and their raw outputs in an ordinary forward pass."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from adderops.nn import AdderConv2d, AdderLinear


def _weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear, AdderLinear))}


def classifier(model: nn.Module) -> tuple[str, nn.Module]:
    """Returns name and module of the classifier: the convolution or linear layer registered last.

    Raises:
        ValueError: the model has no such layer.

    >>> classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 10)))
    ('2', Linear(in_features=8, out_features=10, bias=True))
    """
    layers = _weighted_layers(model)
    if not layers:
        raise ValueError("model: expected a convolution or a linear layer, got a model without")
    return layers.popitem()


def matched_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that PKKD matches, by name: all 2-d convolutions except the first and the classifier.

    These are `AdderConv2d` and `nn.Conv2d` in the order of registration, so the CNN and the adder network of one
    architecture have the same names. A layer that occurs twice is listed once.

    >>> from adderops.models import lenet5
    >>> list(matched_layers(lenet5("adder"))), list(matched_layers(lenet5("cnn")))
    (['conv2', 'conv3', 'conv4'], ['conv2', 'conv3', 'conv4'])
    """
    layers = _weighted_layers(model)
    first = next((m for m in layers.values() if isinstance(m, _ConvNd)), None)
    ends = (first, next(reversed(layers.values()), None))
    return {name: m for name, m in layers.items() if isinstance(m, (nn.Conv2d, AdderConv2d)) and m not in ends}


class IntermediateOutputs:
    """Records the raw outputs of the matched layers in each forward pass of a model, before BatchNorm and ReLU.

    Forward hooks record them; the output of the model is unchanged. In-place activations would overwrite them, so
    `inplace` of all modules is set to False, for good; this changes no value.

    Each forward pass drops the outputs of the last one. They take memory until `take()`: set `enabled` to False if they
    are not needed, as in evaluation. The hooks also run under `torch.compile`, without graph breaks.

    The hooks are copied and pickled with the model, and with them this object, without outputs: a copy of something
    that contains both works like the original. Call `remove()` before you copy, export or convert the model alone.

    Args:
        model: any module; hooks are registered on it and on the layers.
        names: of the layers; those of `matched_layers(model)` by default.
        inputs: record what the layers take instead.

    Attributes:
        names: names of the layers, in order.
        layers: the layers.
        enabled: whether a forward pass records outputs; True by default.

    Raises:
        ValueError: the model has no matched layer, or a name is not one of its layers.
        RuntimeError: in a forward pass that runs a matched layer twice.

    >>> from adderops.models import lenet5
    >>> network = lenet5("adder")
    >>> outputs = IntermediateOutputs(network)
    >>> logits = network(torch.randn(2, 1, 32, 32))
    >>> [(name, tuple(y.shape)) for name, y in zip(outputs.names, outputs.take())]
    [('conv2', (2, 16, 10, 10)), ('conv3', (2, 120, 1, 1)), ('conv4', (2, 84, 1, 1))]
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None, inputs: bool = False) -> None:
        modules = dict(model.named_modules())
        unknown = [name for name in names or () if name not in modules]
        if unknown:
            raise ValueError(f"names: expected layers of the model, got {unknown}")
        matched = matched_layers(model) if names is None else {name: modules[name] for name in names}
        if not matched:
            raise ValueError("model: expected a convolution between the first and the classifier, got a model without")
        self.names: list[str] = list(matched)
        self.layers: list[nn.Module] = list(matched.values())
        self.enabled, self.inputs = True, inputs
        self._outputs: list[Tensor | None] = [None] * len(matched)
        self._handles = [model.register_forward_pre_hook(self._forget)]
        self._handles += [layer.register_forward_hook(partial(self._keep, i)) for i, layer in enumerate(self.layers)]
        for module in model.modules():
            if getattr(module, "inplace", False) is True:
                setattr(module, "inplace", False)  # noqa: B010  (nn.Module declares no such attribute)

    def take(self) -> list[Tensor]:
        """Returns the outputs of the last forward pass in the order of `names`, with graph, and drops them.

        Raises:
            RuntimeError: a layer was not run, or its output was changed in place.
        """
        kept, outputs = list(self._outputs), []
        self._forget()
        for name, output in zip(self.names, kept, strict=True):
            if output is None:
                raise RuntimeError(f"IntermediateOutputs: layer {name!r} was not run in the last forward")
            # the layer returns version 0; a compiled region does not know versions
            if not torch.compiler.is_compiling() and not output.is_inference() and output._version:
                raise RuntimeError(f"IntermediateOutputs: the output of layer {name!r} was changed in place after it")
            outputs.append(output)
        return outputs

    def remove(self) -> None:
        """Removes the hooks and drops the outputs; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    def _forget(self, *_: object) -> None:
        for i in range(len(self._outputs)):
            self._outputs[i] = None

    def _keep(self, i: int, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self.enabled:
            return
        if self._outputs[i] is not None:
            raise RuntimeError(
                f"IntermediateOutputs: layer {self.names[i]!r} was run twice in one forward: it can keep one output"
            )
        self._outputs[i] = inputs[0] if self.inputs else output

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_outputs": [None] * len(self._outputs)}
