"""From a calibrated network to one that computes in bytes: `convert`.

The network is traced by `torch.export`; each adder layer takes what follows it - BatchNorm, a sum, ReLU - into its
epilogue, and where another adder layer follows, its output leaves as bytes on that layer's grid:

    conv -> bn -> relu ->            adder -> bn -> (+ residual) -> relu ->            pool -> classifier
    F.conv2d (bn in its weights)     adder_conv2d_int8 (one call)                      floats
             -> quantize ->
"""

import operator
from dataclasses import asdict
from itertools import count

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from adderops import _ops
from adderops.quant.calibration import quantized_layers, unwrapped
from adderops.quant.fake_quantized import Quantized, QuantizedEnd
from adderops.quant.grid import Grid, excess
from adderops.quant.network import IntegerNetwork, assemble, in_memory_format, tensor_name
from adderops.quant.tracing import trace

aten = torch.ops.aten
_ADDER = _ops.adder_conv2d
_CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
_LAST = torch.channels_last
_NORM = aten.batch_norm.default


@torch.no_grad()
def convert(model: nn.Module, example: Tensor) -> IntegerNetwork:
    """Returns the network of bytes that a calibrated model stands for; the model is left as it is.

    Sums are exact integers; scale, BatchNorm, residual sum, ReLU and the rounding to the next layer's grid are the
    epilogue of the same call, so that activations stay bytes from adder layer to adder layer.  What is not an adder
    layer stays in floats: the first convolution and the classifier (on their 8-bit grids with `ends='int8'`), pooling,
    and whatever else the network has.

    Args:
        model: what `calibrate` returned, possibly trained further; of any floating dtype, its own or wrapped.
        example: an input (N, ...); the size of the batch may differ later.

    Returns:
        The network for inference: its `code` is readable, its buffers are the bytes of the weights with scale and
        offset, under the names of the layers.  It takes inputs of the dtype of `example`, and computes in bytes and
        float32.

    Raises:
        TypeError: example is no tensor of floats.
        ValueError: the model is not calibrated, or example is no input of it.
        RuntimeError: a layer that has seen no input.
        Also what `torch.export.export` raises for a model that it cannot trace.

    >>> from adderops.models import lenet5
    >>> from adderops.quant import calibrate, reestimate_batchnorm
    >>> images = torch.randn(8, 1, 32, 32)
    >>> model = reestimate_batchnorm(lenet5(), [images]).eval()  # stands for training
    >>> integer = convert(calibrate(model, [images]), images)
    >>> torch.allclose(integer(images), model(images), atol=1e-3)
    True
    >>> integer.conv2.weight.dtype
    torch.uint8
    """
    model = unwrapped(model)
    layers = quantized_layers(model).values()
    if not layers:
        raise ValueError("model: expected a calibrated one (adderops.quant.calibrate), got none of its layers")
    for layer in layers:
        if not layer.in_floats:
            layer.input_grid()  # or an error
    if not isinstance(example, Tensor) or not example.is_floating_point():
        got = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"example: expected a tensor of floats, got {got}")
    if example.dim() < 2 or len(example) == 0:
        raise ValueError(f"example: expected (N, ...) with N >= 1, got shape {tuple(example.shape)}")
    traced, layers = trace(model, example)
    return _Fusion(traced, layers).run(tuple(example.shape[1:]), example.dtype)


class _Fusion:
    """One conversion: the graph of floats, and beside it the bytes that its nodes become.

    Attributes:
        bytes: (node, grid) -> the node that computes its value as bytes.
        grid_of: the nodes whose value exists as bytes only.
        constants: the tensors of the new network by name.
        converted: the quantized layers that the network computes with integers, by the names of their tensors.
    """

    def __init__(self, traced: GraphModule, layers: dict[str, Quantized]) -> None:
        self.traced, self.graph, self.layers = traced, traced.graph, layers
        self.graph.owning_module = None  # it will name tensors that the traced module does not have
        self.bytes: dict[tuple[Node, Grid], Node] = {}
        self.grid_of: dict[Node, Grid] = {}
        self.constants: dict[str, Tensor] = {}
        self.converted: dict[str, Quantized] = {}
        self.made: set[Node] = set()  # of get_attr, by `_constant`

    def run(self, shape: tuple[int, ...], dtype: torch.dtype) -> IntegerNetwork:
        for node in list(self.graph.nodes):
            if node.target == _ADDER and self._layer(node) is not None:
                self._adder(node)
            elif node.target in (*_CONVOLUTIONS, aten.linear.default):
                self._multiplying(node)
        self.graph.eliminate_dead_code()
        for node, grid in self.grid_of.items():
            if node.users:
                self._floats_for(node, grid)
        self.graph.eliminate_dead_code()
        if dtype != torch.float32:
            self._cast_input()
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and node not in self.made:
                with self.graph.inserting_before(node):
                    name = _without_root(str(node.target))
                    node.replace_all_uses_with(self._constant(name, self._value(str(node.target))))
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            node.meta = {"layer": node.meta.get("layer")}
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        knowledge = {
            "scheme": asdict(next(iter(self.layers.values())).scheme),
            "layers": {name: [asdict(grid) for _, grid in layer.grids()] for name, layer in self.converted.items()},
            "shape": shape,
            "dtype": dtype,
        }
        return assemble(self.graph, {name: self.constants[name] for name in read}, knowledge)

    def _cast_input(self) -> None:
        """Takes inputs of another dtype than float32."""
        [image] = [node for node in self.graph.nodes if node.op == "placeholder"]
        readers = list(image.users)
        with self.graph.inserting_after(image):
            floats = self.graph.call_function(aten.to.dtype, (image, torch.float32))
        for reader in readers:
            reader.replace_input_with(image, floats)

    # --- the parts of a network ---

    def _adder(self, node: Node) -> None:
        """An adder layer and what its epilogue takes in."""
        layer, name = self._layer(node), self._name(node)
        norm, residual, relu, last = self._chain(node)
        wanted = self._wanted(last)
        a, b = self._affine(norm, len(layer.weight), layer.bias)  # y = a * (- sum |x - w|) + b + r * residual
        r = 1.0
        if residual is not None:
            stored = next((grid for other, grid in self.bytes if other is residual), None)
            if stored is not None:
                r, b = stored.scale, b - stored.scale * stored.zero_point
                residual = self.bytes[residual, stored]
        bounds = (0, 255)
        if wanted is not None:
            a, b = a / wanted.scale, b / wanted.scale + wanted.zero_point
            r = r if residual is None else r / wanted.scale
            bounds = (wanted.zero_point, wanted.quant_max)
        source = self._bytes(node.args[0], layer.input_grid(), before=node)
        outputs, grids, stored = [], layer.grids(), layer.input_grid()
        self.converted[tensor_name(name)] = layer
        with self.graph.inserting_before(last):
            for i, (filters, grid) in enumerate(grids):
                part, added, factor = name, residual, r
                if len(grids) > 1:
                    part = f"{name}.group{i}".removeprefix(".")
                    if residual is not None:
                        added = self._channels(residual, f"{part}.filters", filters)
                    if grid.beyond(stored) is not None:
                        lost = self._lost_by_inputs(source, layer, grid, part, a[filters], node.args[3:])
                        if added is not None:
                            added = self.graph.call_function(aten.to.dtype, (added, torch.float32))
                            added = self.graph.call_function(aten.mul.Tensor, (added, r))
                            lost = self.graph.call_function(aten.add.Tensor, (lost, added))
                        added, factor = lost, 1.0
                w = layer.weight.detach()[filters]
                lost_by_weights = -excess(w, grid).double()
                args = (
                    source if grid == stored else self._regrid(source, grid.bytes(_values(stored)), part),
                    self._constant(_join(part, "weight"), grid.bytes(w)),
                    self._constant(_join(part, "scale"), (a[filters] * grid.scale).float()),
                    self._constant(_join(part, "offset"), (a[filters] * lost_by_weights + b[filters]).float()),
                    added,
                    factor,
                    relu,
                    wanted is not None,
                    *bounds,
                    grid.zero_point,
                    *node.args[3:],
                )
                outputs.append(self.graph.call_function(_ops.adder_conv2d_int8, args))
                outputs[-1].meta["layer"] = name
            [result] = outputs if len(outputs) == 1 else [self.graph.call_function(aten.cat.default, (outputs, 1))]
            if len(outputs) > 1:
                order = torch.cat([filters for filters, _ in grids]).argsort()
                result = self._channels(result, _join(name, "order"), order)
        if wanted is None:
            last.replace_all_uses_with(result)
        else:
            self.bytes[last, wanted], self.grid_of[last] = result, wanted

    def _lost_by_inputs(self, source: Node, layer: Quantized, grid: Grid, part: str, a: Tensor, geometry) -> Node:
        """What clipping the inputs to a group's grid takes off each distance, by the scale a of each filter.

        |x - w| = |clip(x) - w| + |x - clip(x)| for w on the grid: a convolution of the latter with one filter of zeros.
        """
        stored = layer.input_grid()
        beyond, x = grid.beyond(stored), _values(stored)
        args = (
            self._regrid(source, beyond.bytes((x - x.clamp(grid.low, grid.high)).abs()), f"{part}.beyond"),
            self._constant(f"{part}.beyond.weight", torch.zeros_like(layer.weight[:1], dtype=torch.uint8)),
            self._constant(f"{part}.beyond.scale", torch.tensor([beyond.scale])),
            self._constant(f"{part}.beyond.offset", torch.zeros(1)),
            *(None, 1.0, False, False, 0, 255, 0),
            *geometry,
        )
        distances = self.graph.call_function(_ops.adder_conv2d_int8, args)
        factors = self._constant(f"{part}.beyond.factors", a.float()[:, None, None])
        return self.graph.call_function(aten.mul.Tensor, (distances, factors))

    def _multiplying(self, node: Node) -> None:
        """A convolution or linear layer: a BatchNorm behind it goes into its weights, which keep their 8 bits."""
        layer, name = self._layer(node), self._name(node)
        convolution = node.target in _CONVOLUTIONS
        norm = self._norm_after(node) if convolution else None
        if norm is None and not isinstance(layer, QuantizedEnd):
            return
        weight = self._value(node.args[1].target)
        bias = self._value(node.args[2].target) if len(node.args) > 2 and node.args[2] is not None else None
        factor = weight.new_ones(len(weight))
        if norm is not None:
            _, gain, beta, mean, var, _, _, eps, _ = norm.args
            mean, var, gain, beta = (None if n is None else self._value(n.target) for n in (mean, var, gain, beta))
            factor, bias = fuse_conv_bn_weights(factor[:, None, None, None], bias, mean, var, eps, gain, beta)
            factor, bias = factor.detach().flatten(), bias.detach()
        filters = (-1, *(1,) * (weight.dim() - 1))
        source = node.args[0]
        with self.graph.inserting_before(node):
            if isinstance(layer, QuantizedEnd):
                self.converted[tensor_name(name)] = layer
                scales, grid = layer.weight_scales(), layer.input_grid()
                stored = (weight / scales.view(filters)).round().to(torch.int8)
                integers = self._constant(_join(name, "weight"), stored)
                floats = self.graph.call_function(aten.to.dtype, (integers, torch.float32))
                steps = self._constant(_join(name, "scale"), (scales * factor).view(filters))
                new_weight = self.graph.call_function(aten.mul.Tensor, (floats, steps))
                bounds = (-grid.zero_point, grid.quant_max - grid.zero_point)
                for target, *arguments in (
                    (aten.mul.Tensor, 1 / grid.scale),
                    (aten.round.default,),
                    (aten.clamp.default, *bounds),
                    (aten.mul.Tensor, grid.scale),
                ):
                    source = self.graph.call_function(target, (source, *arguments))
            else:
                new_weight = self._constant(_join(name, "weight"), weight * factor.view(filters))
            new_bias = None if bias is None else self._constant(_join(name, "bias"), bias)
            if convolution:  # bytes are channels last
                source = self.graph.call_function(aten.contiguous.default, (source,), {"memory_format": _LAST})
        node.args = (source, new_weight, new_bias, *node.args[3:])
        if norm is not None:
            norm.replace_all_uses_with(node)

    # --- what follows a layer ---

    def _chain(self, node: Node) -> tuple[Node | None, Node | None, bool, Node]:
        """What an adder layer's epilogue takes in: BatchNorm, residual, whether a ReLU; and the last node of it."""
        norm = self._norm_after(node)
        last, residual, relu = norm or node, None, False
        user = _only_user(last)
        if user is not None and user.target == aten.add.Tensor and not user.kwargs:
            [other] = [arg for arg in user.args if arg is not last] or [None]
            if isinstance(other, Node) and _shape(other) == _shape(user):
                residual, last = other, user
                user = _only_user(last)
        if user is not None and user.target == aten.relu.default:
            relu, last = True, user
        return norm, residual, relu, last

    def _norm_after(self, node: Node) -> Node | None:
        """The BatchNorm that alone reads the node."""
        norm = _only_user(node)
        return norm if norm is not None and norm.target == _NORM and norm.args[0] is node else None

    def _wanted(self, node: Node) -> Grid | None:
        """The grid on which all adder layers read the node's value; None where they differ, or there is none."""
        readers = [user for user in node.users if user.target == _ADDER and user.args[0] is node]
        grids = {layer.input_grid() for user in readers if (layer := self._layer(user)) is not None}
        return grids.pop() if len(grids) == 1 else None

    def _affine(self, norm: Node | None, channels: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift (C_out), in float64, of what a layer's distances go through: its bias, the BatchNorm."""
        scale = torch.ones(channels, dtype=torch.float64)
        shift = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.detach().double()
        if norm is not None:
            _, gain, beta, mean, var, _, _, eps, _ = norm.args
            scale = (self._value(var.target).double() + eps).rsqrt()
            if gain is not None:
                scale = scale * self._value(gain.target).double()
            shift = (shift - self._value(mean.target).double()) * scale
            if beta is not None:
                shift = shift + self._value(beta.target).double()
        return scale, shift

    # --- values as bytes and as floats ---

    def _bytes(self, node: Node, grid: Grid, before: Node) -> Node:
        """The node's value as bytes of the grid."""
        if (node, grid) not in self.bytes:
            # rounding to bytes from 0 on is a ReLU
            source = node.args[0] if node.target == aten.relu.default and grid.zero_point == 0 else node
            with self.graph.inserting_before(before):
                args = (source, grid.scale, grid.zero_point, grid.quant_max)
                self.bytes[node, grid] = self.graph.call_function(_ops.quantize, args)
        return self.bytes[node, grid]

    def _floats_for(self, node: Node, grid: Grid) -> None:
        """Gives the users of a node what its bytes stand for."""
        made = self.bytes[node, grid]
        for target, argument in (
            (aten.to.dtype, torch.float32),
            (aten.sub.Tensor, grid.zero_point),
            (aten.mul.Tensor, grid.scale),
        ):
            with self.graph.inserting_after(made):
                made = self.graph.call_function(target, (made, argument))
        node.replace_all_uses_with(made)

    def _regrid(self, source: Node, bytes_: Tensor, name: str) -> Node:
        """Bytes as others, by a table."""
        indices = self.graph.call_function(aten.to.dtype, (source, torch.int64))
        return self.graph.call_function(aten.take.default, (self._constant(f"{name}.table", bytes_), indices))

    def _channels(self, source: Node, name: str, channels: Tensor) -> Node:
        return self.graph.call_function(aten.index_select.default, (source, 1, self._constant(name, channels)))

    # --- the traced network ---

    def _constant(self, name: str, value: Tensor) -> Node:
        """A tensor of the new network; a layer that runs twice has two of those that differ."""
        value = in_memory_format(value.detach())
        for i in count(1):
            found = tensor_name(name if i == 1 else f"{name}_{i}")
            known = self.constants.setdefault(found, value)
            if known.dtype == value.dtype and torch.equal(known, value):
                node = self.graph.create_node("get_attr", found)
                self.made.add(node)
                return node

    def _name(self, node: Node) -> str:
        """Of the layer whose operator this is."""
        return _without_root(str(node.args[1].target)).removesuffix("weight").removesuffix(".")

    def _layer(self, node: Node) -> Quantized | None:
        """The quantized layer whose operator this is."""
        name = str(node.args[1].target).removesuffix(".weight") if isinstance(node.args[1], Node) else None
        return self.layers.get(name)

    def _value(self, name: str) -> Tensor:
        return operator.attrgetter(name)(self.traced).detach()


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape(node: Node) -> torch.Size:
    return node.meta["val"].shape


def _values(grid: Grid) -> Tensor:
    """What the bytes of a grid stand for, in their order."""
    return grid.floats(torch.arange(grid.quant_max + 1))


def _join(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _without_root(name: str) -> str:
    """A name of the model's own, without that of the Sequential round it."""
    return name.removeprefix("0").removeprefix(".")
