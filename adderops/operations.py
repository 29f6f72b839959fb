"""Counts the multiplications and additions of a network per image, and estimates their energy.

The convention is AdderNet's (arXiv 1912.13200): a multiply-accumulate is one multiplication and one addition, a term
|x - w| of an adder layer is two additions (the subtraction and the accumulation).  Convolutions and matrix products
count, inside layers or not; biases, BatchNorm, activations, pooling and residual sums do not.

By this convention the paper's ResNet-32 (69.12 M of each as a CNN) is the stem, the 3x3 layers, the two 1x1 shortcuts
and the classifier.  Its ResNet-20 is not: the paper has 41.17 M (81.89 M additions as an adder network), and the same
layers take 40.81 M (81.18 M).  The two networks differ by twelve layers of 2.36 M, so no other choice of layers gives
both numbers.

In a spiking network a spike adds one weight to each output that it reaches, so that additions depend on the images.
Membranes count, unlike activations: their additions are the sum over the time steps, of which a CNN has only one.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from adderops import _ops
from adderops.spiking.network import Spikes, sites

_ADDERS = (_ops.adder_conv2d.overloadpacket, _ops.adder_conv2d_int8.overloadpacket)
_ATEN = torch.ops.aten
# What is made of spikes stays so: values moved, and the maxima or means of windows.
_AVERAGES = (_ATEN.avg_pool2d, _ATEN.avg_pool3d)
_MOVES = {
    *(_ATEN.view, _ATEN._unsafe_view, _ATEN.expand, _ATEN.permute, _ATEN.transpose, _ATEN.unsqueeze, _ATEN.squeeze),
    *(_ATEN.slice, _ATEN.select, _ATEN.cat, _ATEN.clone),
    *(_ATEN.max_pool2d_with_indices, _ATEN.max_pool3d_with_indices, *_AVERAGES),
}
_IMAGES = 25  # run at once

# pJ per (multiplication, addition), 45 nm, 0.9 V: M. Horowitz, "Computing's energy problem (and what we can
# do about it)", ISSCC 2014, figure 1.1.9, doi:10.1109/ISSCC.2014.6757323
_PICOJOULES = {"float32": (3.7, 0.9), "float16": (1.1, 0.4), "int32": (3.1, 0.1), "int8": (0.2, 0.03)}


class LayerOperations(NamedTuple):
    """Operations of one layer.

    Attributes:
        name: of the layer in the model.
        layer: its type.
        multiplications, additions: per image.

    >>> LayerOperations("conv1", "Conv2d", multiplications=100, additions=100).additions
    100
    """

    name: str
    layer: str
    multiplications: int
    additions: int


@dataclass(frozen=True)
class Operations:
    """Operations per image of a model; `str()` is a table.

    Attributes:
        layers: one row per layer, in the order of the model.

    >>> layer = LayerOperations("conv", "Conv2d", 100, 100)
    >>> counted = Operations((layer, LayerOperations("add", "AdderLinear", 0, 50)))
    >>> counted.multiplications, counted.additions
    (100, 150)
    """

    layers: tuple[LayerOperations, ...]

    @property
    def multiplications(self) -> int:
        """Total of all layers."""
        return sum(layer.multiplications for layer in self.layers)

    @property
    def additions(self) -> int:
        """Total of all layers."""
        return sum(layer.additions for layer in self.layers)

    def __str__(self) -> str:
        rows = [*self.layers, LayerOperations("total", "", self.multiplications, self.additions)]
        cells = [("name", "layer", "multiplications", "additions")]
        cells += [(row.name, row.layer, f"{row.multiplications:,}", f"{row.additions:,}") for row in rows]
        name, layer, multiplications, additions = (max(map(len, column)) for column in zip(*cells, strict=True))
        return "\n".join(f"{a:<{name}}  {b:<{layer}}  {c:>{multiplications}}  {d:>{additions}}" for a, b, c, d in cells)


def count_operations(model: nn.Module, example: Tensor | Sequence[int]) -> Operations:
    """Counts the multiplications and additions of a model per image.

    A layer of C_out filters with K weights each (K = C_in/groups·KH·KW, or in_features) and P output pixels takes

        C_out·P·K multiplications and as many additions   (Conv2d, Linear, any other convolution or matrix product)
        0 multiplications and 2·C_out·P·K additions       (AdderConv2d, AdderLinear)

    No values are computed: a copy of the model in evaluation mode runs on the meta device.

    Args:
        model: a model with one input; it is left unchanged.
        example: the input (N, ...), or its shape, for an input of the model's dtype. N and the values do not matter.

    Returns:
        One row per innermost layer with operations, summed over all its calls. A last row 'elsewhere', if needed, has
        the products outside of these layers (attention, for example).

    Raises:
        TypeError: example is neither a tensor nor a sequence of integers.
        ValueError: example has no dimension after N, or an empty one; a spiking network.

    Source: AdderNet, arXiv 1912.13200, section 4 (the counting); `torch.utils.flop_counter` (the products).

    >>> from adderops import AdderConv2d
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), AdderConv2d(8, 4, 3))
    >>> print(count_operations(model, (1, 3, 8, 8)))
    name   layer        multiplications  additions
    0      Conv2d                 7,776      7,776
    3      AdderConv2d                0      9,216
    total                         7,776     16,992
    """
    if any(site.steps for site in sites(model).values()):
        raise ValueError(
            "count_operations: model: expected one whose operations do not depend on the values of the images, got a "
            "spiking network: use count_spiking_operations"
        )
    batch = _one_image(model, example)
    replica = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        replica(batch)

    flops, root = counter.get_flop_counts(), type(replica).__name__  # of a GraphModule a copy has another
    layers = []
    for name, module in replica.named_modules(remove_duplicate=False):  # the counter knows one name per module
        key = f"{root}.{name}" if name else root
        if key in flops and not any(module.children()):
            layers.append(LayerOperations(name or root, type(module).__name__, *_split(flops[key])))
    counted = Operations(tuple(layers))
    multiplications, additions = _split(flops.get("Global", {}))
    if additions == counted.additions:
        return counted
    missing = multiplications - counted.multiplications, additions - counted.additions
    return Operations((*layers, LayerOperations("elsewhere", "", *missing)))


def _one_image(model: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    """Returns an input of batch size 1 on the meta device."""
    if isinstance(example, Tensor):
        shape, dtype = tuple(example.shape), example.dtype
    elif isinstance(example, Sequence) and all(isinstance(size, int) for size in example):
        shape = tuple(example)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    else:
        raise TypeError(f"count_operations: example: expected a tensor or the shape of one, got {example!r}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"count_operations: example: expected (N, ...) without zeros, got shape {tuple(shape)}")
    return torch.empty((1, *shape[1:]), dtype=dtype, device="meta")


def _split(flops: Mapping[Any, int]) -> tuple[int, int]:
    """Returns (multiplications, additions), given the floating-point operations per operator."""
    of_adders = sum(flops.get(adder, 0) for adder in _ADDERS)
    of_products = sum(flops.values()) - of_adders
    return of_products // 2, of_products // 2 + of_adders


@dataclass(frozen=True)
class SpikingOperations(Operations):
    """Operations per image of a spiking network.

    Attributes:
        layers: one row per layer and per group of neurons, in the order of the forward pass.
        rates: spikes per neuron and time step, by the names of `adderops.spiking.sites`.

    >>> neurons = LayerOperations("spikes.0", "IntegrateAndFire", 0, 24)
    >>> SpikingOperations((neurons,), {"spikes.0": 0.5}).additions
    24
    """

    rates: Mapping[str, float]


def count_spiking_operations(network: nn.Module, images: Tensor) -> SpikingOperations:
    """Counts the multiplications and additions of a spiking network per image, by running it on images.

    The input of a layer is made of spikes if it is the output of neurons, or sums of such outputs, maxima or averages
    of their windows, views and concatenations, or anything with a row per time step and image that has one value per
    channel besides 0. The value of the spikes and the divisor of an average then belong to the weights. What counts is

        per spike in a layer's input    an addition for each output that it reaches: out_features; of a convolution
                                        C_out/groups for each window that has it, fewer at borders and with strides
        per neuron and time step        an addition to the membrane, and a multiplication if it leaks
        per spike of a neuron           an addition for the reset

    A spike in several windows of an average is in each of these averages. Other inputs, such as the image and the rates
    before the classifier, count as in `count_operations`, as often as the layer is computed: once for a constant
    current, T times for other currents.

    Args:
        network: of `adderops.spiking.spiking`, or another with `adderops.spiking.Spikes`; it is left unchanged, and a
            copy runs in evaluation mode.
        images: (N, ...), on the network's device.

    Returns:
        Means over the images, rounded to integers, and the rates of the neurons. A last row 'elsewhere', if needed, has
        the products outside of layers.

    Raises:
        ValueError: a network without neurons, or no images.

    >>> from adderops.spiking import IntegrateAndFire, spiking
    >>> cnn = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 3))
    >>> with torch.no_grad():
    ...     _, _ = cnn[0].weight.copy_(torch.eye(2)), cnn[0].bias.zero_()
    >>> network = spiking(cnn, 4, partial(IntegrateAndFire, reset="zero"))
    >>> counted = count_spiking_operations(network, torch.tensor([[0.5, 1.0]]))  # 2 and 4 spikes
    >>> print(Operations(counted.layers[:3]))
    name      layer             multiplications  additions
    0         Linear                          4          4
    spikes.0  IntegrateAndFire                0         14
    2         Linear                          0         30
    total                                     4         48
    """
    if not any(site.steps for site in sites(network).values()):
        got = type(network).__name__
        raise ValueError(f"count_spiking_operations: network: expected a spiking network, got {got} without neurons")
    if images.dim() < 2 or len(images) == 0:
        raise ValueError(f"count_spiking_operations: images: expected (N, ...) with N >= 1, got {tuple(images.shape)}")
    replica = copy.deepcopy(network).eval()
    counter = _SpikeCounter(replica)
    with torch.no_grad(), counter:
        for part in images.split(_IMAGES):
            replica(part)
    rows = [
        LayerOperations(
            name or "elsewhere",
            type(getattr(module, "neuron", module)).__name__ if name else "",
            round(counter.multiplications[name] / len(images)),
            round(counter.additions[name] / len(images)),
        )
        for name in sorted(counter.additions, key=lambda name: name == "")  # the network itself comes last
        for module in [replica.get_submodule(name)]
    ]
    return SpikingOperations(tuple(rows), {name: counter.fired[name] / n for name, n in counter.neurons.items()})


class _SpikeCounter(TorchDispatchMode):
    """Counts the operations of a network, and keeps the number of spikes behind each value that is made of them.

    Attributes:
        multiplications, additions: by the name of the innermost module, in the order of the first calls.
        fired, neurons: spikes, and neurons times steps, by the name of the neurons.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.multiplications, self.additions = Counter[str](), Counter[str]()
        self.fired, self.neurons = Counter[str](), Counter[str]()
        self._sites = sites(network).keys()
        self._spikes = WeakTensorKeyDictionary()
        self._called: list[str] = []  # modules in progress, the innermost last
        self._images = 0  # at once
        for name, module in network.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name))

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._called.append(name)
        if name == "":
            self._images = len(inputs[0])

    def _leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._called.pop()
        if isinstance(module, Spikes) and module.steps:
            self._spikes[output] = spikes = (output != 0).to(output.dtype)
            leaky = getattr(module.neuron, "decay", 1) != 1 or hasattr(module.neuron, "tau")  # tau: of SpikingJelly
            self.fired[name] += (fired := _total(spikes))
            self.neurons[name] += (neurons := output.numel())
            self.multiplications[name] += neurons * leaky
            self.additions[name] += neurons + fired

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output, operator = function(*args, **kwargs), function.overloadpacket
        if not self._sites.isdisjoint(self._called):  # inside of neurons, which count by what they return
            return output
        if operator in flop_registry:
            multiplications, additions = self._of_product(operator, args, kwargs, output)
            self.multiplications[self._called[-1]] += multiplications
            self.additions[self._called[-1]] += additions
        first = output[0] if isinstance(output, tuple) else output  # a maximum comes with its place
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        is_sum = operator is _ATEN.add and len(inputs) == 2 and not kwargs
        if (is_sum or operator in _MOVES) and all(tensor in self._spikes for tensor in inputs):
            of_spikes = tree_map_only(Tensor, self._spikes.__getitem__, args)
            if operator in _AVERAGES:
                of_spikes, kwargs = of_spikes[:6], {"divisor_override": 1}
            spikes = function(*of_spikes, **kwargs)
            self._spikes[first] = spikes[0] if isinstance(output, tuple) else spikes
        elif isinstance(first, Tensor):
            self._spikes.pop(first, None)  # it may have changed in place
        return output

    def _of_product(self, operator: Any, args: Any, kwargs: Any, output: Any) -> tuple[int, int]:
        """Returns (multiplications, additions) of a convolution or another product."""
        spikes = None
        if operator in (_ATEN.convolution, _ATEN.mm, _ATEN.addmm):
            input = args[1 if operator is _ATEN.addmm else 0]
            spikes = self._spikes.get(input)
            if spikes is None and len(input) != self._images and _has_one_value_per_channel(input):
                spikes = (input != 0).to(input.dtype)
        if spikes is None:
            return _split({operator: flop_registry[operator](*args, **kwargs, out_val=output)})
        if operator is not _ATEN.convolution:
            return 0, _total(spikes) * output.size(1)
        weight, transposed, groups = args[1], args[6], args[8]
        filters = (weight.size(0), 1) if transposed else (groups, weight.size(1))  # one per group
        ones = weight.new_ones((*filters, *weight.shape[2:]), dtype=torch.float64)
        summed = spikes.sum(0, keepdim=True, dtype=torch.float64)
        return 0, _total(operator(summed, ones, None, *args[3:])) * (output.size(1) // groups)


def _has_one_value_per_channel(x: Tensor) -> bool:
    """Whether each channel, dimension 1, has at most one value besides 0, up to rounding."""
    values = x.transpose(0, 1).flatten(1)
    zero = values == 0
    spread = values.masked_fill(zero, -torch.inf).amax(1) - values.masked_fill(zero, torch.inf).amin(1)
    return bool((spread <= 1e-4 * values.abs().amax(1)).all())


def _total(x: Tensor) -> int:
    return round(x.sum(dtype=torch.float64).item())


def energy(operations: Operations, precision: str = "float32") -> float:
    """Returns the energy of the arithmetic for one image, in pJ.

    It is multiplications · e_mul + additions · e_add, with the energies of 45 nm circuits of one precision.
    Memory accesses, which often cost more, are not included.

    Args:
        operations: what `count_operations` returned.
        precision: 'float32', 'float16', 'int32' or 'int8'.

    Raises:
        ValueError: another precision.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.

    >>> energy(Operations((LayerOperations("conv", "Conv2d", multiplications=1000, additions=1000),)))
    4600.0
    """
    if precision not in _PICOJOULES:
        raise ValueError(f"energy: precision: expected one of {', '.join(map(repr, _PICOJOULES))}, got {precision!r}")
    multiplication, addition = _PICOJOULES[precision]
    return operations.multiplications * multiplication + operations.additions * addition
