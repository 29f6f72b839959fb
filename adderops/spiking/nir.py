"""Spiking networks in the Neuromorphic Intermediate Representation (NIR, package nir), for other tools and chips."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.utils import _pair

from adderops.spiking.network import Spikes, name_of, sites
from adderops.spiking.neuron import IntegrateAndFire, over_neurons

if TYPE_CHECKING:
    import nir

DT = 1e-4  # seconds of a step: what snnTorch and SpikingJelly take it for when they read a file

_POOLING = {"max_pool2d": nn.MaxPool2d, "avg_pool2d": nn.AvgPool2d, "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d}
_NOTHING = ("_repeat", "dropout", "dropout2d", "identity", "require_image_size")  # what these do in evaluation mode


class _Value(NamedTuple):
    """The value of a node of the network: in the NIR graph the sum of `sources`, times `amplitude` per channel."""

    sources: tuple[str, ...]
    amplitude: Tensor | None = None  # None: 1; otherwise there is one source
    spikes: bool = False  # 0 or the amplitude


def to_nir(network: nn.Module, shape: Sequence[int]) -> nir.NIRGraph:
    r"""Returns a spiking network in evaluation mode as a NIR graph.

    The graph gets the image in each step; the mean of its output over the steps is the logits. Its nodes have the names
    of the modules, and no batch dimension. Edges into the same node add up. BatchNorms and the values of scaled spikes
    are in the weights of the layers, or in a Scale at a shortcut. A maximum of spikes is SumPool2d and Threshold.

    NIR describes continuous time. The graph has the spikes of the network in steps of forward Euler,
    :math:`v \leftarrow v + dt\,\dot v` with dt = 0.0001 s: first the membranes integrate, then the neurons fire. An
    edge that closes a cycle carries the value of the step before.

        IF   r = gain / dt
        LIF  tau = dt / (1 - decay), r = gain / (1 - decay), v_leak = 0

    Both reset to v_reset = 0. No neuron of NIR resets by subtraction: such neurons are three nodes, membrane (I or LI),
    spike (Threshold), and reset (Scale by -decay V / gain), from the spikes back to the membrane. An initial membrane,
    which NIR has not either, lowers their threshold. All thresholds are the next smaller number, because NIR fires
    above them and `integrate_and_fire` at them.

    Args:
        network: of `spiking`, with `IntegrateAndFire`; it is left unchanged.
        shape: (C, H, W) of an image.

    Raises:
        ModuleNotFoundError: nir is not installed.
        ValueError: a part without a counterpart in NIR; the message names it.

    >>> from adderops.spiking import spiking
    >>> network = spiking(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), 4, lambda: IntegrateAndFire(reset="zero"))
    >>> sorted(to_nir(network, (2,)).nodes)
    ['0', 'input', 'output', 'spikes.0']
    """
    try:
        import nir
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to_nir: nir is missing: install the extra adderops[spiking]", name="nir") from error
    if not isinstance(network, fx.GraphModule) or not sites(network):
        raise ValueError(f"to_nir: network: expected a spiking network, got {type(network).__name__}")
    steps = next(iter(sites(network).values())).steps
    dtype = torch.promote_types(next(network.parameters()).dtype, torch.float32)
    with torch.no_grad():
        fused = fuse(copy.deepcopy(network).to("cpu", dtype).eval(), no_trace=True)  # BatchNorms into convolutions
        assert isinstance(fused, fx.GraphModule)
        ShapeProp(fused).propagate(torch.zeros(1, *shape, dtype=dtype))
        writer = _Writer(nir, fused, dtype)
        for node in fused.graph.nodes:
            if "tensor_meta" in node.meta:  # not a size
                writer.values[node] = writer.write(node)
    about = {"dt": DT, "steps": steps, "logits": "mean of the output over the steps, each with the image as input"}
    return nir.NIRGraph(writer.nodes, writer.edges, metadata=about)


class _Writer:
    """Translates the nodes of a network, in their order."""

    def __init__(self, nir: Any, network: fx.GraphModule, dtype: torch.dtype) -> None:
        self.nir, self.modules, self.dtype = nir, dict(network.named_modules()), dtype
        self.nodes, self.edges = dict[str, Any](), list[tuple[str, str]]()
        self.values = dict[fx.Node, _Value]()

    def write(self, node: fx.Node) -> _Value:
        shape, sources = _shape(node), node.all_input_nodes
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        kind, name = name_of(node, self.modules), node.name if module is None else str(node.target)
        if name in self.nodes:  # a second call
            name = node.name
        if kind in _POOLING:
            given = {key: value for key, value in node.kwargs.items() if key != "return_indices"}
            module = _POOLING[kind](*node.args[1:], **given)
        if node.op == "placeholder":
            return self._add("input", self.nir.Input(np.array(shape)))
        if node.op == "output":
            return self._add("output", self.nir.Output(np.array(shape)), self._unscaled(sources[0]))
        if kind in ("add", "iadd") and len(sources) == 2 and all(source in self.values for source in sources):
            return _Value(self._unscaled(sources[0]) + self._unscaled(sources[1]))
        if isinstance(module, Spikes) and isinstance(module.neuron, IntegrateAndFire):
            return self._neurons(name, module.neuron, shape, self._unscaled(sources[0]))
        if getattr(type(module), "forward", None) in (nn.Conv2d.forward, nn.Linear.forward):
            return self._layer(name, module, node)
        if kind in _NOTHING:
            return self.values[sources[0]]
        if kind in ("_meanoversteps", "_sumsoversteps"):
            return self.values[sources[0]]._replace(spikes=False)
        if kind in ("flatten", "reshape", "view") and len(shape) == 1:
            value, before = self.values[sources[0]], np.array(_shape(sources[0]))
            return value._replace(sources=self._add(name, self.nir.Flatten(before, 0, -1), value.sources).sources)
        if isinstance(module, tuple(_POOLING.values())):
            return self._pooling(name, module, node)
        raise _refused(node, "a layer that NIR has", kind)

    def _neurons(self, name: str, neuron: IntegrateAndFire, shape: Sequence[int], sources: tuple[str, ...]) -> _Value:
        nir, decay, gain, zero = self.nir, neuron.decay, neuron.gain, neuron.reset_to == "zero"
        like = torch.empty(1, 1, *shape)
        v, initial = (over_neurons(value, like).expand(shape) for value in (neuron.threshold, neuron.initial))
        if initial.any() and (zero or decay < 1):
            raise ValueError(f"to_nir: {name}: initial: expected 0 with decay < 1 or reset='zero', got another value")
        threshold = self._array(torch.nextafter(neuron.fire * v - initial, v.new_tensor(-math.inf)))
        numbers = {"r": gain / DT} if decay == 1 else {"tau": DT / (1 - decay), "r": gain / (1 - decay), "v_leak": 0.0}
        arrays = {key: self._array(v.new_full(shape, number)) for key, number in numbers.items()}
        if zero:
            spikes = self._add(name, (nir.IF if decay == 1 else nir.LIF)(**arrays, v_threshold=threshold), sources)
        else:
            membrane, spike, reset = (f"{name}.{part}" for part in ("membrane", "spike", "reset"))
            self._add(membrane, (nir.I if decay == 1 else nir.LI)(**arrays), (*sources, reset))
            spikes = self._add(spike, nir.Threshold(threshold), (membrane,))
            self._add(reset, nir.Scale(self._array(-decay / gain * v)), (spike,))
        spikes = spikes._replace(spikes=True)
        if not neuron.scaled:
            return spikes
        of_channels = v.reshape(len(v), -1)
        if (of_channels == of_channels[:, :1]).all():
            return spikes._replace(amplitude=of_channels[:, 0])
        return self._add(f"{name}.scale", nir.Scale(self._array(v)), spikes.sources)

    def _layer(self, name: str, layer: Any, node: fx.Node) -> _Value:
        value, size = self.values[node.all_input_nodes[0]], _shape(node.all_input_nodes[0])[1:]
        if name != node.target:  # `fuse` would have changed it twice
            raise _refused(node, "one call of a layer", "another")
        weight, bias = layer.weight, layer.bias
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise _refused(node, "padding with zeros", layer.padding_mode)
        if isinstance(layer, nn.Conv2d):  # nir and its readers compare shapes as if groups were 1
            blocks = weight.unflatten(0, (layer.groups, -1))
            weight = torch.einsum("goikl,gh->gohikl", blocks, torch.eye(layer.groups)).flatten(0, 1).flatten(1, 2)
        if value.amplitude is not None:
            weight = weight * _over_channels(value.amplitude, weight.shape[1:])
        arrays = self._array(weight), self._array(torch.zeros(len(weight)) if bias is None else bias)
        if isinstance(layer, nn.Linear):
            return self._add(name, self.nir.Affine(*arrays), value.sources)
        conv = self.nir.Conv2d(size, arrays[0], layer.stride, layer.padding, layer.dilation, 1, arrays[1])
        return self._add(name, conv, value.sources)

    def _pooling(self, name: str, pooling: Any, node: fx.Node) -> _Value:
        source, value = node.all_input_nodes[0], self.values[node.all_input_nodes[0]]
        if isinstance(pooling, nn.AdaptiveAvgPool2d):
            (_, height, width), (_, rows, columns) = _shape(source), _shape(node)
            if height % rows or width % columns:
                raise _refused(node, f"windows of one size in {height}x{width}", f"{rows}x{columns} of them")
            pooling = nn.AvgPool2d((height // rows, width // columns))
        maximum, windows = isinstance(pooling, nn.MaxPool2d), (pooling.kernel_size, pooling.stride, pooling.padding)
        kernel, stride, padding = (np.array(_pair(numbers)) for numbers in windows)
        special = pooling.dilation != 1 if maximum else pooling.divisor_override or not pooling.count_include_pad
        if pooling.ceil_mode or special:
            raise _refused(node, "pooling with default options", pooling)
        if not maximum:
            average = self._add(name, self.nir.AvgPool2d(kernel, stride, padding), value.sources)
            return average._replace(amplitude=value.amplitude)
        if not value.spikes:
            raise _refused(node, "a maximum of spikes", "one of their sums or means, or of currents")
        counts = self._add(name, self.nir.SumPool2d(kernel, stride, padding), value.sources)
        half = self.nir.Threshold(self._array(torch.full(_shape(node), 0.5)))
        return value._replace(sources=self._add(f"{name}.spike", half, counts.sources).sources)

    def _unscaled(self, node: fx.Node) -> tuple[str, ...]:
        """Returns the sources whose sum is the value; a Scale where it has an amplitude."""
        value, shape = self.values[node], _shape(node)
        if value.amplitude is None:
            return value.sources
        [source] = value.sources
        if f"{source}.scale" not in self.nodes:
            scale = self._array(_over_channels(value.amplitude, shape).expand(shape))
            self._add(f"{source}.scale", self.nir.Scale(scale), value.sources)
        return (f"{source}.scale",)

    def _add(self, name: str, node: Any, sources: tuple[str, ...] = ()) -> _Value:
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return _Value((name,))

    def _array(self, tensor: Tensor) -> Any:
        return tensor.to(self.dtype).contiguous().numpy()


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of a node's value for one image and step."""
    return tuple(node.meta["tensor_meta"].shape[1:])


def _over_channels(amplitude: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns amplitudes of channels, which may be flattened since, in a shape that broadcasts against (C, ...)."""
    return amplitude.repeat_interleave(shape[0] // len(amplitude)).view(-1, *(1 for _ in shape[1:]))


def _refused(node: fx.Node, expected: str, got: object) -> ValueError:
    return ValueError(f"to_nir: {node.name}: expected {expected}, got {got}")
